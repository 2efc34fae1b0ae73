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
  #sent = []; // { text, at }
  #awaited = null; // { branch, videoFrame, at }: the server has said which picture it will be

  sent(text, at) {
    this.#sent.push({ text, at });
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
