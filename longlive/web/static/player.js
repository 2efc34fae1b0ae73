// Players of a stream: fragments through Media Source Extensions, or pictures on a canvas. Both have
//
//   begin(stream)   a new epoch, as the protocol's `stream` says; goes on without a seam where the last one ended
//   push(media)     what belongs to it
//   play(), pause()
//   position()      { epoch, videoFrame }: what is on the screen now, or null before the first picture
//   close()
//
// and call onShown({ epoch, branch, videoFrame, at }) for every picture that reaches the screen, `at` in performance.now();
// the first also onFailed() when the browser cannot go on with what it was given.

const INIT = 1;
const KEPT_S = 20; // of what was played already
const TRIMMED_S = 10; // and what is left of it when it is trimmed: more than a group of pictures

/** "mp4" if this browser plays it, "webp" otherwise or if it is forced. */
export function chooseFormat(mime, forced) {
  if (forced === "webp" || forced === "mp4") return forced;
  return "MediaSource" in window && MediaSource.isTypeSupported(mime) ? "mp4" : "webp";
}

export function makePlayer(format, { video, canvas, onShown, onFailed }) {
  video.hidden = format !== "mp4";
  canvas.hidden = format === "mp4";
  return format === "mp4" ? new VideoPlayer(video, onShown, onFailed) : new PicturePlayer(canvas, onShown);
}

/** Whether a stream goes on where `last`, of which all before video frame `end` has come, leaves off. */
function continues(stream, last, end) {
  return last !== null && last.branch === stream.branch && last.fps === stream.fps && end === stream.video_frame;
}

/**
 * The browser's clock never goes back: an epoch that does not continue the last one is placed a little behind
 * everything that was there, and the video jumps there once its first pictures have come. Until then the last one stays.
 */
class VideoPlayer {
  #video;
  #onShown;
  #source = null;
  #buffer = null;
  #work = []; // functions that each start one operation of the buffer, or none
  #stream = null;
  #end = 0; // video frames of this branch that have come
  #spans = []; // { from, offset, stream }: what is shown at which times of the browser's clock; two at most
  #jump = null; // the time to jump to
  #shown = null;
  #wantsPlay = true;
  #callback = 0;

  constructor(video, onShown, onFailed) {
    this.#video = video;
    this.#onShown = onShown;
    this.#open();
    this.#watch();
    video.onerror = onFailed;
  }

  begin(stream) {
    if (continues(stream, this.#stream, this.#end)) {
      const { offset } = this.#spans.at(-1);
      this.#spans = [this.#spans.at(-1), { from: offset + stream.video_frame / stream.fps, offset, stream }];
    } else {
      const from = this.#freeTime();
      this.#spans = [{ from, offset: from - stream.video_frame / stream.fps, stream }];
      this.#jump = from;
      this.#shown = null;
      this.#work = [(buffer) => buffer.remove(0, Infinity)];
    }
    const { offset } = this.#spans.at(-1);
    this.#stream = stream;
    this.#end = stream.video_frame;
    this.#do((buffer) => {
      buffer.changeType(stream.mime);
      buffer.timestampOffset = offset;
    });
  }

  push({ kind, epoch, videoFrame, numVideoFrames, payload }) {
    if (epoch !== this.#stream?.epoch) return;
    this.#do((buffer) => buffer.appendBuffer(payload));
    if (kind === INIT) return;
    this.#end = videoFrame + numVideoFrames;
    this.#do(() => this.#enter());
    this.#do((buffer) => this.#trim(buffer));
  }

  play() {
    this.#wantsPlay = true;
    this.#video.play().catch(() => {}); // interrupted by a pause, or nothing is there yet: `#enter` tries again
  }

  pause() {
    this.#wantsPlay = false;
    this.#video.pause();
  }

  position() {
    // At the end of what has come no picture is left to be shown, whether the last one was announced or not.
    const end = this.#bufferedEnd();
    if (this.#shown && this.#video.currentTime > end - 1 / this.#stream.fps) return this.#at(end - 1 / this.#stream.fps);
    return this.#shown;
  }

  close() {
    this.#video.cancelVideoFrameCallback?.(this.#callback);
    cancelAnimationFrame(this.#callback);
    this.#callback = -1;
    this.#video.onerror = null;
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  #open() {
    const source = new MediaSource();
    const url = URL.createObjectURL(source);
    source.addEventListener("sourceopen", () => {
      URL.revokeObjectURL(url);
      this.#next();
    }, { once: true });
    this.#source = source;
    this.#video.src = url;
  }

  /** What is to be done with the buffer, in its order: it takes one thing at a time. */
  #do(operation) {
    this.#work.push(operation);
    this.#next();
  }

  #next() {
    if (this.#source.readyState !== "open" || !this.#stream || this.#buffer?.updating) return;
    this.#buffer ??= this.#addBuffer();
    while (this.#work.length && !this.#buffer.updating) this.#work.shift()(this.#buffer);
  }

  #addBuffer() {
    const buffer = this.#source.addSourceBuffer(this.#stream.mime);
    this.#source.duration = Infinity;
    buffer.addEventListener("updateend", () => this.#next());
    return buffer;
  }

  #bufferedEnd() {
    const { buffered } = this.#video;
    return buffered.length ? buffered.end(buffered.length - 1) : 0;
  }

  /** A time of the browser's clock at which nothing is or was. */
  #freeTime() {
    if (this.#spans.length === 0) return 0;
    return Math.ceil(Math.max(this.#bufferedEnd(), this.#video.currentTime, this.#spans.at(-1).from)) + 1;
  }

  /** Jump to where the epoch begins as soon as it is there, and play. */
  #enter() {
    if (this.#jump !== null && this.#bufferedEnd() > this.#jump) {
      this.#video.currentTime = this.#jump;
      this.#jump = null;
    }
    if (this.#wantsPlay && this.#video.paused) this.play();
  }

  #trim(buffer) {
    const time = this.#video.currentTime;
    if (buffer.buffered.length && time - buffer.buffered.start(0) > KEPT_S) buffer.remove(0, time - TRIMMED_S);
  }

  /** Which picture begins at a time of the browser's clock; null if it is of an epoch that is over. */
  #at(time) {
    const span = this.#spans.findLast(({ from, stream }) => time >= from - 0.5 / stream.fps);
    if (!span) return null;
    const { offset, stream } = span;
    return { epoch: stream.epoch, branch: stream.branch, videoFrame: Math.round((time - offset) * stream.fps) };
  }

  #watch() {
    const announce = (time, at) => {
      const shown = this.#at(time);
      if (!shown || (this.#shown && shown.videoFrame === this.#shown.videoFrame && shown.epoch === this.#shown.epoch)) return;
      this.#shown = shown;
      this.#onShown({ ...shown, at });
    };
    if ("requestVideoFrameCallback" in HTMLVideoElement.prototype) {
      const frame = (now, { mediaTime, expectedDisplayTime }) => {
        announce(mediaTime, Math.max(now, expectedDisplayTime));
        if (this.#callback !== -1) this.#callback = this.#video.requestVideoFrameCallback(frame);
      };
      this.#callback = this.#video.requestVideoFrameCallback(frame);
    } else {
      const tick = (now) => {
        if (this.#video.readyState >= 2 && !this.#video.seeking) {
          announce(Math.floor(this.#video.currentTime * this.#stream.fps) / this.#stream.fps, now);
        }
        if (this.#callback !== -1) this.#callback = requestAnimationFrame(tick);
      };
      this.#callback = requestAnimationFrame(tick);
    }
  }
}

/** Pictures, each shown for a frame's time; when the next is late, the clock waits for it. */
class PicturePlayer {
  #canvas;
  #context;
  #onShown;
  #stream = null;
  #end = 0;
  #queue = []; // { stream, videoFrame, bitmap }; bitmap is null until it is decoded
  #due = 0;
  #shown = null;
  #isPlaying = true;
  #isClosed = false;

  constructor(canvas, onShown) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d", { alpha: false });
    this.#onShown = onShown;
    const tick = (now) => {
      this.#draw(now);
      if (!this.#isClosed) requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  begin(stream) {
    if (!continues(stream, this.#stream, this.#end)) {
      for (const { bitmap } of this.#queue) bitmap?.close();
      this.#queue = [];
      this.#shown = null;
    }
    this.#stream = stream;
    this.#end = stream.video_frame;
  }

  push({ epoch, videoFrame, payload }) {
    if (epoch !== this.#stream?.epoch) return;
    const entry = { stream: this.#stream, videoFrame, bitmap: null };
    this.#queue.push(entry);
    this.#end = videoFrame + 1;
    createImageBitmap(new Blob([payload], { type: "image/webp" })).then((bitmap) => {
      entry.bitmap = bitmap;
    });
  }

  play() {
    this.#isPlaying = true;
  }

  pause() {
    this.#isPlaying = false;
  }

  position() {
    return this.#shown;
  }

  close() {
    this.#isClosed = true;
    for (const { bitmap } of this.#queue) bitmap?.close();
    this.#queue = [];
  }

  #draw(now) {
    const next = this.#queue[0];
    if (!this.#isPlaying || !next?.bitmap || now < this.#due) return;
    const { stream, videoFrame, bitmap } = this.#queue.shift();
    if (this.#canvas.width !== bitmap.width || this.#canvas.height !== bitmap.height) {
      Object.assign(this.#canvas, { width: bitmap.width, height: bitmap.height });
    }
    this.#context.drawImage(bitmap, 0, 0);
    bitmap.close();
    const period = 1000 / stream.fps;
    this.#due = (now - this.#due < 2 * period ? this.#due : now) + period;
    this.#shown = { epoch: stream.epoch, branch: stream.branch, videoFrame };
    this.#onShown({ ...this.#shown, at: now });
  }
}
