// Suggestions for the built-in model, which knows the Shapes world alone: one or two bodies on a background.

const COLOURS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"];
const SHAPES = ["star", "square", "triangle", "cross", "circle", "ring"];
const BACKGROUNDS = ["black", "white", "grey", "sand"];
const MOTIONS = ["bounces", "orbits", "sways", "rises", "sinks", "zigzags", "drifts to the right", "drifts to the left"];

const EXAMPLES = [
  "A big red square rises on a black background.",
  "A big blue triangle bounces on a white background.",
  "A small yellow circle orbits on a grey background.",
  "A big green cross sways on a sand background.",
];

/** Prompts that differ from this one in one thing: { label, text }. Those of a prompt that they do not fit: the examples. */
export function suggestions(prompt) {
  const variants = [
    swap(prompt, COLOURS, (word) => word),
    swap(prompt, SHAPES, (word) => word),
    swap(prompt, MOTIONS, (word) => word),
    swap(prompt, BACKGROUNDS.map((word) => `${word} background`), (words) => `on ${words.split(" ")[0]}`),
    swap(prompt, ["big", "small"], (word) => word),
  ].filter((variant) => variant !== null);
  return variants.length === 5 ? variants : EXAMPLES.map((text) => ({ label: text.replace(/a (\w+) background\./, "$1"), text }));
}

/** The prompt with its only word of `words` replaced by the next; null where there is none, or several. */
function swap(prompt, words, name) {
  const found = words.filter((word) => new RegExp(`\\b${word}\\b`, "i").test(prompt));
  if (found.length !== 1) return null;
  const next = words[(words.indexOf(found[0]) + 1) % words.length];
  return { label: name(next), text: prompt.replace(new RegExp(`\\b${found[0]}\\b`, "i"), next) };
}
