// What stands on and under the picture: the state in words, the empty picture, figures, and one line of messages.

import { clock, errorWords, stateWords } from "./words.js";

const ACTIONS = { replaced: "Watch it here", ended: "Begin a new one", forgotten: "Begin a new one", reconnecting: "Try now" };
const COVERING = new Set(["unauthorized", "forbidden", "replaced", "ended", "forgotten"]);
const UNCONNECTED = new Set(["connecting", "reconnecting", "loading", "busy"]);
const RESUMABLE = new Set(["paused", "parked"]);
const PAUSABLE = new Set(["playing", "rebuilding"]);

const byId = (id) => document.getElementById(id);

/** Writing what stands there already would make screen readers say it again. */
function write(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

export const isPausable = (state) => PAUSABLE.has(state);
export const isResumable = (state) => RESUMABLE.has(state);

/** The state, and the empty picture while there is nothing to see. */
export function showState({ state, position, hasPicture }) {
  const [title, text] = stateWords(state, position);
  document.body.dataset.state = state;
  write("state-text", title);
  const covers = !hasPicture || COVERING.has(state);
  byId("empty").hidden = !covers;
  write("empty-title", title);
  write("empty-text", text);
  byId("token-form").hidden = state !== "unauthorized";
  const action = byId("empty-action");
  action.hidden = !(state in ACTIONS);
  if (!action.hidden) write("empty-action", ACTIONS[state]);
  const pause = byId("pause");
  pause.disabled = !PAUSABLE.has(state) && !RESUMABLE.has(state);
  pause.classList.toggle("resumes", RESUMABLE.has(state));
  write("pause-text", RESUMABLE.has(state) ? "Go on" : "Pause");
  byId("restart").disabled = byId("end").disabled = COVERING.has(state) || UNCONNECTED.has(state);
}

/** Figures; null is shown as a dash. */
export function showFacts({ seconds, fps, latencyMs, seed }) {
  write("length", seconds === null ? "–" : clock(seconds));
  write("speed", fps === null ? "–" : `${fps.toFixed(1)} fps`);
  write("latency", latencyMs === null ? "–" : `${(latencyMs / 1000).toFixed(2)} s`);
  write("seed", seed === null ? "–" : String(seed));
}

/** One line beneath the prompt; an empty text clears it. */
export function say(text) {
  byId("message").classList.remove("error");
  write("message", text);
}

export function sayError(error) {
  byId("message").classList.add("error");
  write("message", errorWords(error));
}

export const isSayingError = () => byId("message").classList.contains("error");
