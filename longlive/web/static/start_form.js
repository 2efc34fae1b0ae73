// "Begin anew": another seed, a picture to begin with.

const TYPES = ["image/png", "image/jpeg", "image/webp"];
const MAX_SEED = Number.MAX_SAFE_INTEGER;

const byId = (id) => document.getElementById(id);

export class StartForm {
  #seed = byId("start-seed");
  #file = byId("start-picture");
  #name = byId("picture-name");
  #preview = byId("preview");
  #remove = byId("no-picture");
  #upload; // its key; null: without a picture; undefined: as it was
  #sending = null; // the newest picture's way to the server
  #limits = null;
  #send;
  #onError;

  /** upload(file): a promise of its key; onRestart({ seed, upload }); onError({ code, message }). */
  constructor({ upload, onRestart, onError }) {
    this.#send = upload;
    this.#onError = onError;
    byId("start-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      while (this.#sending) if (!(await this.#sending)) return; // it was refused, which has been said
      const seed = this.#readSeed();
      const given = Object.entries({ seed, upload: this.#upload }).filter(([, value]) => value !== undefined);
      if (seed !== null) onRestart(Object.fromEntries(given));
    });
    byId("dice").addEventListener("click", () => {
      this.#seed.value = String(crypto.getRandomValues(new Uint32Array(1))[0] >>> 1);
    });
    this.#file.addEventListener("change", () => this.#file.files.length && this.#take(this.#file.files[0]));
    this.#remove.addEventListener("click", () => {
      this.#clear("No picture", null);
      this.#file.focus();
    });
    this.#acceptDrops();
  }

  focus() {
    this.#seed.focus();
  }

  set limits(limits) {
    this.#limits = limits;
  }

  /** What the selected branch began with. */
  show({ seed, upload }) {
    this.#seed.placeholder = String(seed);
    if (this.#upload === undefined && !this.#sending) {
      this.#name.textContent = upload ? "The same as before" : "Choose or drop one";
      this.#remove.hidden = !upload;
    }
  }

  /** It was used: what is not given stays. */
  clear() {
    this.#seed.value = "";
    this.#clear("", undefined);
  }

  #clear(text, upload) {
    this.#upload = upload;
    this.#sending = null;
    this.#file.value = "";
    this.#preview.hidden = this.#remove.hidden = true;
    this.#name.textContent = text;
  }

  #readSeed() {
    const text = this.#seed.value.trim();
    if (text === "") return undefined;
    if (/^\d+$/.test(text) && Number(text) <= MAX_SEED) return Number(text);
    this.#onError({ code: "bad_value", message: `a seed is a whole number from 0 to ${MAX_SEED}` });
    this.#seed.focus();
    return null;
  }

  /** A picture, in place of any that is still on its way. */
  async #take(file) {
    this.#file.value = ""; // the same one may be chosen again
    const bitmap = await this.#read(file);
    if (typeof bitmap === "string") {
      this.#onError({ code: "bad_picture", message: `${file.name}: ${bitmap}` });
      return;
    }
    this.#draw(bitmap);
    const sending = this.#transfer(file, () => this.#sending === sending);
    this.#sending = sending;
    sending.finally(() => {
      if (this.#sending === sending) this.#sending = null;
    });
  }

  /** Whether it is not refused: the server has it, or another has taken its place. */
  async #transfer(file, isNewest) {
    this.#name.textContent = "Being sent";
    try {
      const upload = await this.#send(file);
      if (!isNewest()) return true;
      this.#upload = upload;
    } catch (refused) {
      if (!isNewest()) return true;
      this.#clear("Choose or drop one", undefined);
      this.#onError(refused);
      return false;
    }
    this.#name.textContent = this.#name.title = file.name;
    this.#preview.hidden = this.#remove.hidden = false;
    if ([document.body, this.#file].includes(document.activeElement)) byId("restart").focus(); // who types goes on
    return true;
  }

  /** The picture of a file, or what is wrong with it. */
  async #read(file) {
    if (!TYPES.includes(file.type)) return "only PNG, JPEG and WebP pictures can begin a video";
    if (!this.#limits) return "not connected yet";
    const { max_upload_bytes: maxBytes, max_upload_px: maxPx } = this.#limits;
    if (file.size > maxBytes) return `${(file.size / 1e6).toFixed(1)} MB, and at most ${(maxBytes / 1e6).toFixed(1)} are taken`;
    const bitmap = await createImageBitmap(file).catch(() => null);
    if (!bitmap) return "it cannot be read";
    const { width, height } = bitmap;
    if (width * height > maxPx) return `${width} × ${height}, and at most ${(maxPx / 1e6).toFixed(1)} million pixels are taken`;
    return bitmap;
  }

  #draw(bitmap) {
    const { width, height } = bitmap;
    const scale = Math.max(this.#preview.width / width, this.#preview.height / height); // cover
    const size = [width * scale, height * scale];
    const corner = [(this.#preview.width - size[0]) / 2, (this.#preview.height - size[1]) / 2];
    this.#preview.getContext("2d").drawImage(bitmap, ...corner, ...size);
    bitmap.close();
  }

  #acceptDrops() {
    const hasFile = (event) => event.dataTransfer?.types.includes("Files");
    const mark = (event, isOver) => {
      if (!hasFile(event)) return;
      event.preventDefault();
      document.body.classList.toggle("dropping", isOver);
    };
    addEventListener("dragover", (event) => mark(event, true));
    addEventListener("dragleave", (event) => event.relatedTarget === null && mark(event, false));
    addEventListener("drop", (event) => {
      mark(event, false);
      if (hasFile(event) && event.dataTransfer.files.length) this.#take(event.dataTransfer.files[0]);
    });
  }
}
