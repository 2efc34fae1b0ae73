// The time line of a branch: its prompts, thumbnails, what is being watched, and a cursor to choose a moment with.

import { clock } from "./words.js";

const PX_PER_SECOND = 32;
const THUMBNAIL_S = 3;
const EDGE_PX = 72; // kept free behind the playhead when following it

const byId = (id) => document.getElementById(id);

export class Timeline {
  #scroller = byId("scroller");
  #track = byId("track");
  #prompts = byId("track-prompts");
  #thumbnails = byId("track-thumbnails");
  #playhead = byId("playhead");
  #cursor = byId("cursor");
  #onChoose;
  #thumbnailUrl;
  #timing = null;
  #branch = null;
  #shownThumbnails = 0;
  #moment = null; // the frame at which the cursor is: where a block begins
  #playheadX = null; // null: nothing is watched
  #follows = true; // what is shown follows the playhead, until someone scrolls it out of view

  /** onChoose(frame): go on from there. thumbnailUrl(branch, frame). */
  constructor({ onChoose, thumbnailUrl }) {
    this.#onChoose = onChoose;
    this.#thumbnailUrl = thumbnailUrl;
    this.#track.addEventListener("pointermove", (event) => event.pointerType === "mouse" && this.#point(event));
    this.#track.addEventListener("pointerleave", () => this.#place(null));
    this.#track.addEventListener("blur", () => this.#place(null));
    this.#track.addEventListener("click", (event) => {
      this.#point(event);
      this.#choose();
    });
    this.#track.addEventListener("keydown", (event) => this.#key(event));
    this.#scroller.addEventListener("scroll", () => {
      const { scrollLeft, clientWidth } = this.#scroller;
      const x = this.#playheadX ?? scrollLeft;
      this.#follows = x >= scrollLeft && x <= scrollLeft + clientWidth;
    });
  }

  focus() {
    this.#track.focus();
  }

  /** Show a branch as it is by now. */
  show(branch, timing) {
    if (branch.branch !== this.#branch?.branch) this.clear();
    this.#branch = branch;
    this.#timing = timing;
    this.#track.style.width = `${this.#x(branch.num_frames)}px`;
    this.#track.setAttribute("aria-disabled", String(branch.num_frames === 0));
    this.#track.ariaValueMax = String(Math.floor(branch.num_video_frames / timing.fps));
    this.#showPrompts();
    this.#addThumbnails();
  }

  /** What is being watched, in video frames. */
  setPlayhead(videoFrame) {
    if (!this.#branch) return;
    this.#playhead.hidden = false;
    this.#playheadX = (videoFrame / this.#timing.fps) * PX_PER_SECOND;
    this.#playhead.style.transform = `translateX(${this.#playheadX}px)`;
    if (this.#moment !== null) return;
    if (this.#follows) this.#follow(this.#playheadX);
    this.#tell(this.#timing.frame(videoFrame));
  }

  #follow(x) {
    const { scrollLeft, clientWidth } = this.#scroller;
    if (x < scrollLeft || x > scrollLeft + clientWidth - EDGE_PX) this.setScroll(x - clientWidth + EDGE_PX);
  }

  /** Another branch, or another session. */
  clear() {
    this.#branch = this.#playheadX = null;
    this.#follows = true;
    this.#playhead.hidden = true;
    this.#prompts.replaceChildren();
    this.#thumbnails.replaceChildren();
    this.#shownThumbnails = 0;
    this.#place(null);
    this.setScroll(0);
  }

  setScroll(x) {
    this.#scroller.scrollLeft = x;
  }

  #x(frame) {
    return this.#timing.seconds(frame) * PX_PER_SECOND;
  }

  #showPrompts() {
    const { prompts, num_frames: end } = this.#branch;
    prompts.forEach(({ frame, text }, index) => {
      let label = this.#prompts.children[index];
      if (!label) {
        label = document.createElement("span");
        this.#prompts.append(label);
      }
      label.textContent = label.title = text;
      label.style.left = `${this.#x(frame)}px`;
      label.style.width = `${this.#x(prompts[index + 1]?.frame ?? end) - this.#x(frame)}px`;
    });
    while (this.#prompts.children.length > prompts.length) this.#prompts.lastChild.remove();
  }

  #addThumbnails() {
    const period = THUMBNAIL_S * this.#timing.fps; // video frames
    while (this.#shownThumbnails * period < this.#branch.num_video_frames) {
      const videoFrame = this.#shownThumbnails++ * period;
      const picture = document.createElement("img");
      picture.alt = "";
      picture.loading = "lazy";
      picture.decoding = "async";
      picture.src = this.#thumbnailUrl(this.#branch, this.#timing.frame(videoFrame));
      picture.style.left = `${(videoFrame / this.#timing.fps) * PX_PER_SECOND}px`;
      this.#thumbnails.append(picture);
    }
  }

  #point(event) {
    if (!this.#branch?.num_frames) return;
    const x = event.clientX - this.#track.getBoundingClientRect().left;
    const frame = this.#timing.frame(Math.max(0, Math.floor((x / PX_PER_SECOND) * this.#timing.fps)));
    this.#place(this.#timing.blockStart(Math.min(frame, this.#branch.num_frames - 1), this.#branch));
  }

  #place(frame) {
    this.#moment = frame;
    this.#cursor.hidden = frame === null;
    if (frame === null) return;
    const x = this.#x(frame);
    this.#cursor.style.transform = `translateX(${x}px)`;
    byId("cursor-text").textContent = clock(this.#timing.seconds(frame));
    this.#cursor.classList.toggle("left", x > this.#track.clientWidth - 64 && x > 64);
    this.#tell(frame);
  }

  #tell(frame) {
    const { prompts } = this.#branch;
    const prompt = prompts.findLast((item) => item.frame <= frame)?.text ?? "";
    this.#track.ariaValueNow = String(Math.floor(this.#timing.seconds(frame)));
    this.#track.ariaValueText = `${clock(this.#timing.seconds(frame))}, ${prompt}`;
  }

  #choose() {
    const frame = this.#moment;
    if (frame === null) return;
    this.#place(null);
    this.#onChoose(frame);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.#branch?.num_frames) return;
    const branch = this.#branch;
    const last = this.#timing.blockStart(branch.num_frames - 1, branch);
    const starts = branch.prompts.map((item) => item.frame);
    const from = this.#moment ?? last;
    const moves = {
      ArrowLeft: () => this.#timing.nextBlock(from, -1, branch),
      ArrowRight: () => Math.min(last, this.#timing.nextBlock(from, 1, branch)),
      PageUp: () => starts.findLast((start) => start < from) ?? 0,
      PageDown: () => starts.find((start) => start > from) ?? last,
      Home: () => 0,
      End: () => last,
    };
    if (event.key in moves) {
      this.#place(moves[event.key]());
      this.#reveal(this.#x(this.#moment));
    } else if (event.key === "Enter") this.#choose();
    else if (event.key === "Escape") this.#place(null);
    else return;
    event.preventDefault();
  }

  #reveal(x) {
    const { scrollLeft, clientWidth } = this.#scroller;
    if (x < scrollLeft + EDGE_PX) this.setScroll(x - EDGE_PX);
    else if (x > scrollLeft + clientWidth - EDGE_PX) this.setScroll(x - clientWidth + EDGE_PX);
  }
}
