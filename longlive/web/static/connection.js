// The connection to the server: opens or takes up the session, comes back when it breaks, answers requests.

import { keep, recall } from "./storage.js";

const KEPT = "longlive.session";
const RETRY_MS = [300, 1000, 2000, 4000, 8000];
const BUSY_MS = 4000;
const HIDDEN_MS = 60000; // nobody waits for it: often enough that the session is not forgotten
const PING_MS = 15000;
const MAX_UNANSWERED = 2; // pings: time alone does not tell, since timers of a hidden page run once a minute
const ANSWER_MS = 10000;
const HEADER_BYTES = 16;

/** A request that the server refused, or that did not reach it. */
export class Refused extends Error {
  constructor({ code, message }) {
    super(message);
    this.code = code;
  }
}

export class Connection {
  #socket = null;
  #waiting = new Map(); // id of a request -> { resolve, reject }
  #nextId = 1;
  #attempt = 0;
  #timer = 0;
  #turn = 0; // of connecting: only the newest goes on
  #unanswered = 0; // pings
  #isOpen = false; // the session is open: requests may be sent
  #isLoading = false; // no models yet: the server was started a moment ago

  /**
   * chooseFormat(hello): "mp4" or "webp"; onMessage(message); onMedia({ kind, epoch, videoFrame, numVideoFrames, payload });
   * onState(state): connecting, reconnecting and the ways in which a connection ends (words.js).
   */
  constructor({ token, chooseFormat, onMessage, onMedia, onState }) {
    this.token = token;
    this.chooseFormat = chooseFormat;
    this.onMessage = onMessage;
    this.onMedia = onMedia;
    this.onState = onState;
    this.session = recall("sessionStorage", KEPT);
    setInterval(() => this.#watch(), PING_MS);
    addEventListener("online", () => this.#timer && this.connect());
  }

  /** An address of the server, with the token where it needs one. */
  url(path, query = {}) {
    const url = new URL(path, document.baseURI);
    for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
    if (this.token) url.searchParams.set("token", this.token);
    return url;
  }

  async connect() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#leave();
    const turn = ++this.#turn;
    if (this.#attempt === 0) this.onState("connecting");
    // A refused WebSocket tells a page nothing: ask first. While models are loaded only the health can be asked for.
    const health = await this.#fetch("api/health").then((answer) => answer.json()).catch(() => null);
    const isLoading = health?.engine === "loading";
    const status = health && !isLoading ? await this.#fetch("api/info").then((answer) => answer.status, () => 0) : 0;
    if (turn !== this.#turn) return;
    this.#isLoading = isLoading;
    if (health?.code === "forbidden" || status === 403) this.onState("forbidden");
    else if (status === 401) this.onState("unauthorized");
    else if (status === 200 || this.#isLoading) this.#openSocket();
    else this.#retry("reconnecting");
  }

  /** Give up the session that was, and begin another one. */
  begin() {
    this.#forget();
    this.#attempt = 0;
    this.connect();
  }

  /** Send without waiting for an answer; what cannot be sent is lost. */
  tell(message) {
    if (this.#isOpen) this.#socket.send(JSON.stringify(message));
  }

  /** Send, and wait until the server has taken it in. Rejects with Refused. */
  request(message) {
    if (!this.#isOpen) return Promise.reject(new Refused({ code: "offline", message: "not connected" }));
    return this.#ask(message);
  }

  /** Post a file. Rejects with Refused. */
  async upload(file) {
    const headers = this.token ? { Authorization: `Bearer ${this.token}` } : {};
    const offline = new Refused({ code: "offline", message: "not connected" });
    const answer = await fetch(new URL("api/upload", document.baseURI), { method: "POST", body: file, headers }).catch(() => {
      throw offline;
    });
    const told = await answer.json().catch(() => ({ code: "bad_answer", message: `the server answered ${answer.status}` }));
    if (!answer.ok) throw new Refused(told);
    return told.upload;
  }

  #fetch(path) {
    return fetch(this.url(path), { signal: AbortSignal.timeout(ANSWER_MS) });
  }

  #openSocket() {
    const url = this.url("api/session");
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => {
      this.#unanswered = 0;
      if (typeof data === "string") this.#take(JSON.parse(data));
      else this.onMedia(parseMedia(data));
    };
    socket.onclose = ({ code }) => this.#closed(code);
    this.#socket = socket;
    this.#unanswered = 0;
  }

  #take(message) {
    const waiting = this.#waiting.get(message.id);
    if (waiting) {
      this.#waiting.delete(message.id);
      if (message.type === "error") waiting.reject(new Refused(message));
      else waiting.resolve();
      return;
    }
    if (message.type === "hello") this.#open(message);
    if (message.type === "session") {
      this.session = message.session;
      keep("sessionStorage", KEPT, this.session);
    }
    this.onMessage(message);
  }

  async #open(hello) {
    const format = this.chooseFormat(hello);
    try {
      if (this.session) await this.#ask({ type: "open", session: this.session, format });
      else await this.#ask({ type: "open", format });
    } catch (refused) {
      if (refused.code === "no_session") {
        this.#forget();
        this.onMessage({ type: "lost" });
        await this.#open(hello);
        return;
      }
      if (refused.code !== "offline") this.onMessage({ type: "error", code: refused.code, message: refused.message });
      return; // the server closes, or the connection has ended
    }
    this.#attempt = 0;
    this.#isOpen = true;
    this.onMessage({ type: "open" });
  }

  #ask(message) {
    const id = this.#nextId++;
    this.#socket.send(JSON.stringify({ ...message, id }));
    return new Promise((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
  }

  #closed(code) {
    this.#leave();
    if (code === 1000) this.#end("ended");
    else if (code === 4001) this.onState("replaced"); // the session is kept: this window may take it back
    else if (code === 4003) this.#end("forgotten");
    else this.#retry(code === 1013 ? "busy" : this.#isLoading ? "loading" : "reconnecting");
  }

  #end(state) {
    this.#forget();
    this.onState(state);
  }

  #retry(state) {
    const wait = RETRY_MS[Math.min(this.#attempt++, RETRY_MS.length - 1)];
    const turn = this.#turn;
    const again = () => turn === this.#turn && this.connect();
    this.onState(state);
    const least = document.hidden ? HIDDEN_MS : state === "busy" ? BUSY_MS : 0;
    this.#timer = setTimeout(again, Math.max(wait, least));
    if (document.hidden) document.addEventListener("visibilitychange", again, { once: true });
  }

  #leave() {
    this.#isOpen = false;
    if (this.#socket) {
      this.#socket.onmessage = this.#socket.onclose = null;
      this.#socket.close();
      this.#socket = null;
    }
    for (const { reject } of this.#waiting.values()) reject(new Refused({ code: "offline", message: "not connected" }));
    this.#waiting.clear();
  }

  #forget() {
    this.session = null;
    keep("sessionStorage", KEPT, null);
  }

  /** A network that is gone without a word looks like silence. */
  #watch() {
    if (!this.#isOpen) return;
    if (this.#unanswered === MAX_UNANSWERED) this.#closed(1006);
    else {
      this.#unanswered++;
      this.tell({ type: "ping" });
    }
  }
}

function parseMedia(data) {
  const header = new DataView(data, 0, HEADER_BYTES);
  return {
    kind: header.getUint8(0),
    epoch: header.getUint32(4),
    videoFrame: header.getUint32(8),
    numVideoFrames: header.getUint32(12),
    payload: new Uint8Array(data, HEADER_BYTES),
  };
}
