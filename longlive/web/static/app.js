// The page: what the server says becomes what is seen, what is done becomes messages (docs/PROTOCOL.md).

import { BranchList } from "./branches.js";
import { Connection } from "./connection.js";
import { SpeedMeter, SwitchClock } from "./measures.js";
import { chooseFormat, makePlayer } from "./player.js";
import { PromptBox } from "./prompt_box.js";
import { suggestions } from "./shapes.js";
import { StartForm } from "./start_form.js";
import { isPausable, isResumable, isSayingError, say, sayError, showFacts, showState } from "./status.js";
import { Timeline } from "./timeline.js";
import { Timing } from "./timing.js";

const PLAYED_MS = 100;
const BUILT_IN_MODEL = "tiny";

const byId = (id) => document.getElementById(id);

let forcedFormat = new URLSearchParams(location.search).get("format");
let hello = null;
let timing = null;
let session = null;
let state = "connecting";
let position; // in the queue
let branches = new Map(); // number -> branch, as the protocol describes it
let selected = 0;
let stream = null; // the present epoch
let player = null;
let hasPicture = false; // something of this session is on the screen
let isHeld = false; // paused by whoever watches, not because the page was hidden
let latencyMs = null;
const speed = new SpeedMeter();
const switchClock = new SwitchClock();

const connection = new Connection({
  token: readToken(),
  chooseFormat: ({ mime }) => chooseFormat(mime, forcedFormat),
  onMessage: (message) => HANDLERS[message.type]?.(message),
  onMedia: (media) => media.epoch === stream?.epoch && player.push(media),
  onState: setState,
});
const promptBox = new PromptBox({ onSend: sendPrompt, onSpace: togglePause });
const timeline = new Timeline({ onChoose: rewind, thumbnailUrl });
const branchList = new BranchList({
  onSelect: (branch) => act({ type: "select", branch }),
  onDelete: (branch) => act({ type: "delete", branch }),
  downloadUrl: (branch, what) => connection.url(`api/session/${session}/download`, { branch, what }),
});
const startForm = new StartForm({ upload: (file) => connection.upload(file), onRestart: restart, onError: sayError });

const HANDLERS = {
  hello(message) {
    hello = message;
    timing = new Timing(hello);
    byId("model").textContent = `${hello.model === BUILT_IN_MODEL ? "built-in model" : hello.model}, ${hello.width} × ${hello.height}`;
    const { style } = byId("picture");
    style.setProperty("--ratio", String(hello.width / hello.height));
    byId("picture").classList.toggle("small", hello.width < 240);
    promptBox.maxChars = hello.limits.max_prompt_chars;
    startForm.limits = hello.limits;
  },
  session(message) {
    if (message.session !== session) forgetSession();
    session = message.session;
  },
  open: () => isSayingError() && say(""),
  lost: () => say("The server has forgotten the session. This is a new one."),
  state: (message) => setState(message.state, message.position),
  branches(message) {
    branches = new Map(message.branches.map((branch) => [branch.branch, branch]));
    if (message.selected !== selected) {
      switchClock.select(message.selected);
      if (!isSayingError()) say("");
    }
    selected = message.selected;
    showBranches();
  },
  stream(message) {
    stream = message;
    speed.clear();
    player ??= makePlayer(message.format, { video: byId("video"), canvas: byId("canvas"), onShown, onFailed: usePictures });
    player.begin(message);
    if (!document.hidden && !isHeld) player.play();
  },
  switch(message) {
    switchClock.switched(message);
    const branch = branches.get(message.branch);
    if (branch && !branch.prompts.some(({ frame }) => frame === message.frame)) branch.prompts.push(message);
  },
  block(message) {
    const branch = branches.get(message.branch);
    if (!branch) return;
    branch.num_frames = message.frame + message.num_frames;
    branch.num_video_frames = message.video_frame + message.num_video_frames;
    if (switchClock.pending === branch.prompts.at(-1)?.text) {
      switchClock.forgetSent(); // the prompt that was there: no switch comes
      if (!isSayingError()) say("");
    }
    byId("speed").title = `Made at ${(message.num_video_frames / message.seconds).toFixed(0)} fps`;
    showBranches();
  },
  notice: (notice) => sayError(notice),
  error: (error) => sayError(error),
};

function setState(newState, newPosition) {
  state = newState;
  position = newPosition;
  if (state === "paused") isHeld = true;
  else if (isPausable(state)) isHeld = false;
  if (isHeld) player?.pause();
  if (isPausable(state) && !document.hidden) player?.play();
  show();
}

function show() {
  showState({ state, position, hasPicture });
  const branch = branches.get(selected);
  const fps = isPausable(state) ? speed.fps(performance.now()) : null;
  const seconds = branch?.num_video_frames ? branch.num_video_frames / timing.fps : null;
  showFacts({ seconds, fps, latencyMs, seed: branch?.seed ?? null });
}

function showBranches() {
  const branch = branches.get(selected);
  branchList.show(branches, selected, timing);
  timeline.show(branch, timing);
  startForm.show(branch);
  byId("timeline-hint").hidden = branch.num_frames > 0;
  const offers = hello.model === BUILT_IN_MODEL ? suggestions : null;
  promptBox.suggest(offers, switchClock.pending ?? branch.prompts.at(-1)?.text ?? "");
}

/** A picture has reached the screen. */
function onShown(shown) {
  if (!hasPicture) {
    hasPicture = true;
    show();
  }
  speed.add(shown.at);
  const passed = switchClock.shown(shown);
  if (passed !== null) {
    latencyMs = passed;
    if (!isSayingError()) say("");
  }
  Object.assign(byId("picture").dataset, { branch: shown.branch, videoFrame: shown.videoFrame });
  if (shown.branch === selected) timeline.setPlayhead(shown.videoFrame);
}

/** Nothing of the session before is left. */
function forgetSession() {
  player?.close();
  player = stream = latencyMs = null;
  branches = new Map();
  selected = 0;
  hasPicture = isHeld = false;
  timeline.clear();
  speed.clear();
  switchClock.clear();
}

/** The browser cannot play what it said it could. */
function usePictures() {
  forcedFormat = "webp";
  player.close();
  player = null;
  connection.connect();
}

/** Where the picture of a moment was first made: a branch and those that came from it share it. */
function thumbnailUrl(branch, frame) {
  let origin = branch;
  while (frame < origin.fork_frame && branches.has(origin.parent)) origin = branches.get(origin.parent);
  return connection.url(`api/session/${session}/thumbnail`, { branch: origin.branch, frame });
}

// What is done

/** Ask the server; whether it agreed. What it refuses is said. */
async function act(message) {
  try {
    await connection.request(message);
  } catch (refused) {
    sayError(refused);
    return false;
  }
  if (isSayingError()) say("");
  return true;
}

async function sendPrompt(text) {
  switchClock.sent(text, performance.now(), selected);
  if (await act({ type: "prompt", text })) {
    say(state === "paused" ? `Paused: “${text}” comes when you go on.` : `On its way: ${text}`);
  } else takeBack(text);
}

/** A prompt that was refused. */
function takeBack(text) {
  switchClock.refused(text);
  promptBox.restore(text);
}

/** Go on from a moment of the selected branch, with what is typed. */
async function rewind(frame) {
  const text = promptBox.take();
  if (text) switchClock.sent(text, performance.now(), null);
  const message = { type: "rewind", branch: selected, frame };
  if (!(await act(text ? { ...message, prompt: text } : message))) takeBack(text);
}

async function restart(fields) {
  const text = promptBox.take();
  if (text) switchClock.sent(text, performance.now(), null);
  const before = branches.get(selected);
  if (await act({ type: "restart", ...fields, ...(text ? { prompt: text } : {}) })) {
    startForm.clear();
    if (before.num_frames === 0) act({ type: "delete", branch: before.branch }); // nothing is lost
  } else takeBack(text);
}

function togglePause() {
  if (isPausable(state)) {
    player?.pause();
    act({ type: "pause" });
  } else if (isResumable(state)) {
    act({ type: "resume" });
  }
}

function stepBranch(step) {
  const numbers = [...branches.keys()];
  const next = numbers[numbers.indexOf(selected) + step];
  if (next !== undefined) act({ type: "select", branch: next });
}

function readToken() {
  return new URLSearchParams(location.hash.slice(1)).get("token");
}

// Buttons and keys

byId("skip").addEventListener("click", () => promptBox.focus());
byId("pause").addEventListener("click", togglePause);
byId("picture").addEventListener("click", (event) => event.target.matches("video, canvas") && togglePause());
byId("end").addEventListener("click", () => act({ type: "end" }));
byId("empty-action").addEventListener("click", () => {
  if (state === "ended" || state === "forgotten") {
    say("");
    connection.begin();
  } else connection.connect();
});
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  connection.token = byId("token").value;
  connection.connect();
});
addEventListener("hashchange", () => {
  connection.token = readToken() ?? connection.token;
  connection.connect();
});

const KEYS = {
  " ": togglePause,
  "/": () => promptBox.focus(),
  t: () => timeline.focus(),
  r: () => startForm.focus(),
  "[": () => stepBranch(-1),
  "]": () => stepBranch(1),
  "?"() {
    byId("keys").open = true;
    byId("keys").querySelector("summary").focus();
  },
};

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.matches("input, textarea")) return;
  if (event.key === " " && event.target.matches("button, summary, a")) return;
  const done = KEYS[event.key.toLowerCase()];
  if (!done) return;
  event.preventDefault();
  done();
});

// A hidden page shows nothing, so nothing is made for it.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) player?.pause();
  else if (isPausable(state)) player?.play();
  else if (state === "parked" && !isHeld) act({ type: "resume" });
});

let lastPlayed = { epoch: -1, videoFrame: -1, at: 0 };
setInterval(() => {
  const played = player?.position();
  const now = performance.now();
  if (played && played.epoch === stream.epoch) {
    const isNews = played.videoFrame !== lastPlayed.videoFrame || played.epoch !== lastPlayed.epoch;
    if (isNews || now - lastPlayed.at > 1000) {
      lastPlayed = { ...played, at: now };
      connection.tell({ type: "played", epoch: played.epoch, video_frame: played.videoFrame + 1 });
    }
  }
  if (timing) show();
}, PLAYED_MS);

connection.connect();
