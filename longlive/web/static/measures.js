// What is measured in the page: pictures a second, and how long a prompt takes to be seen.

const WINDOW_MS = 2000;

/** Pictures shown a second, lately. */
export class SpeedMeter {
  #times = [];

  add(at) {
    this.#times.push(at);
    this.#forget(at);
  }

  /** null while too little was shown. */
  fps(now) {
    this.#forget(now);
    const [first] = this.#times;
    if (this.#times.length < 4 || now - first < WINDOW_MS / 4) return null;
    return ((this.#times.length - 1) * 1000) / Math.max(now - first, 1);
  }

  clear() {
    this.#times = [];
  }

  #forget(now) {
    while (this.#times.length && this.#times[0] < now - WINDOW_MS) this.#times.shift();
  }
}

/** From the moment a prompt is sent to its first picture on the screen. */
export class SwitchClock {
  #sent = []; // { text, at, branch }, branch: null for one that is to come
  #awaited = null; // { branch, videoFrame, at }: the server has said which picture it will be

  /** branch: the one that it is sent to, null for one that begins with it. */
  sent(text, at, branch) {
    this.#sent.push({ text, at, branch });
  }

  /** The server would not have it. */
  refused(text) {
    const index = this.#sent.findLastIndex((item) => item.text === text);
    if (index >= 0) this.#sent.splice(index, 1);
  }

  /** Another branch is shown: what was sent to the one before does not come there. */
  select(branch) {
    this.#sent = this.#sent.filter((item) => item.branch === null).map((item) => ({ ...item, branch }));
    this.#awaited = null;
  }

  /** As the protocol's `switch` tells it. */
  switched({ branch, video_frame: videoFrame, text }) {
    const index = this.#sent.findLastIndex((item) => item.text === text);
    if (index < 0) return;
    this.#awaited = { branch, videoFrame, at: this.#sent[index].at };
    this.#sent.splice(0, index + 1);
  }

  /** A picture was shown; milliseconds if it was the awaited one, otherwise null. */
  shown({ branch, videoFrame, at }) {
    if (!this.#awaited || this.#awaited.branch !== branch || videoFrame < this.#awaited.videoFrame) return null;
    const passed = at - this.#awaited.at;
    this.#awaited = null;
    return passed;
  }

  /** What was sent is what is shown already. */
  forgetSent() {
    this.#sent = [];
  }

  /** The prompt that is not seen yet, or null. */
  get pending() {
    return this.#sent.at(-1)?.text ?? null;
  }

  clear() {
    this.#sent = [];
    this.#awaited = null;
  }
}
