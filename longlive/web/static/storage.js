// What the browser keeps for the page, where it keeps anything: where storage is forbidden, reaching for it throws.

/** storage: "localStorage" or "sessionStorage". null for what is not there. */
export function recall(storage, key) {
  try {
    return globalThis[storage].getItem(key);
  } catch {
    return null;
  }
}

/** null: no more. What cannot be kept lasts as long as the page. */
export function keep(storage, key, value) {
  try {
    if (value === null) globalThis[storage].removeItem(key);
    else globalThis[storage].setItem(key, value);
  } catch {
    // full, or forbidden
  }
}
