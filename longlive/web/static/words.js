// What the page says: states, failures and numbers in plain words.

/** Seconds as 1:05. */
export function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** The states of the protocol, and those of the connection. */
const STATES = {
  connecting: ["Connecting", "The server is being asked."],
  reconnecting: ["Connection lost", "Trying again; the session is kept for a while."],
  loading: ["Loading the model", "This takes from a second to a few minutes, depending on the model."],
  queued: ["Waiting for a place", "All places are taken."],
  ready: ["Ready", "Say below what should be seen, and it begins."],
  rebuilding: ["Getting ready", "The past is being read back."],
  playing: ["Playing", "The first pictures are on their way."],
  paused: ["Paused", "Press Space or the button to go on."],
  parked: ["Resting", "Nothing was watched for a while. Go on whenever you like."],
  full: ["Full", "This branch is as long as it may get. Go back to a moment, restart, or select another branch."],
  restarting: ["The engine is starting again", "It stopped. The video goes on by itself from where it was."],
  ended: ["Ended", "The session is over, and what it made is forgotten."],
  unauthorized: ["A token is needed", "Open the address that the server printed, or type its token."],
  forbidden: ["Not under this name", "The server does not accept this address (its setting allowed_hosts)."],
  replaced: ["Watched elsewhere", "This session was opened in another window."],
  forgotten: ["Forgotten", "The server could not keep this session."],
  busy: ["No room", "All places and the queue are taken. It is tried again by itself."],
};

/** Title and explanation of a state. */
export function stateWords(state, position) {
  const [title, text] = STATES[state] ?? [state, ""];
  if (state !== "queued" || position === undefined) return [title, text];
  return [`${title}: number ${position}`, position === 1 ? "You are next." : `${position - 1} others go first.`];
}

const ERRORS = {
  busy: "All places and the queue are taken: try again in a moment.",
  no_upload: "The server has forgotten that picture: choose it again.",
  offline: "Not connected: nothing was sent.",
  engine: "The video cannot go on",
};

/** One line for an error of the protocol. */
export function errorWords({ code, message }) {
  const words = ERRORS[code];
  if (code === "engine") return `${words}: ${message}.`;
  const text = words ?? message;
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
