// The list of branches: select, download, delete.

import { clock } from "./words.js";

const KINDS = [
  ["mp4", "the video"],
  ["zip", "video, script and settings: all that makes it again"],
  ["jsonl", "the script: a prompt file"],
];

export class BranchList {
  #list = document.getElementById("branches");
  #hint = document.getElementById("branches-hint");
  #rows = new Map(); // number -> row

  /** onSelect(number), onDelete(number), downloadUrl(number, what). */
  constructor({ onSelect, onDelete, downloadUrl }) {
    Object.assign(this, { onSelect, onDelete, downloadUrl });
  }

  /** All branches, by number, and which is selected. */
  show(branches, selected, timing) {
    this.#hint.hidden = branches.size > 1;
    for (const [number, row] of this.#rows) {
      if (!branches.has(number)) {
        row.item.remove();
        this.#rows.delete(number);
      }
    }
    for (const branch of branches.values()) this.#update(branch, branch.branch === selected, timing);
  }

  #update(branch, isSelected, timing) {
    const row = this.#rows.get(branch.branch) ?? this.#add(branch);
    const last = branch.prompts.at(-1)?.text;
    row.select.ariaCurrent = String(isSelected);
    row.item.classList.toggle("selected", isSelected);
    row.length.textContent = clock(branch.num_video_frames / timing.fps);
    row.text.textContent = last ?? "no prompt yet";
    row.origin.textContent = this.#origin(branch, timing);
    row.downloads.classList.toggle("off", branch.num_frames === 0);
    for (const link of row.downloads.querySelectorAll("a")) {
      if (branch.num_frames === 0) link.removeAttribute("href");
      else link.href = this.downloadUrl(branch.branch, link.textContent);
    }
    row.delete.hidden = isSelected;
  }

  #origin(branch, timing) {
    const from = branch.parent === null ? "from nothing" : `from ${branch.parent} at ${clock(timing.seconds(branch.fork_frame))}`;
    return `${branch.upload && branch.parent === null ? "from a picture" : from}, seed ${branch.seed}`;
  }

  #add({ branch: number }) {
    const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
    const row = {
      item: make("li", "branch"),
      select: make("button", "branch-select"),
      length: make("span", "branch-length"),
      text: make("span", "branch-text"),
      origin: make("span", "branch-origin quiet"),
      downloads: make("span", "downloads"),
      delete: make("button", "plain", "Delete"),
    };
    const head = make("span", "branch-head");
    head.append(make("span", "branch-name", `Branch ${number}`), row.length);
    row.select.type = row.delete.type = "button";
    row.select.append(head, row.text, row.origin);
    row.select.addEventListener("click", () => this.onSelect(number));
    row.delete.ariaLabel = `Delete branch ${number}`;
    row.delete.addEventListener("click", () => this.onDelete(number));
    for (const [what, title] of KINDS) {
      const link = Object.assign(make("a", "", what), { title, download: `longlive-${number}.${what}` });
      link.ariaLabel = `Download branch ${number} as ${what}: ${title}`;
      row.downloads.append(link);
    }
    const foot = make("div", "branch-foot");
    foot.append(row.downloads, row.delete);
    row.item.append(row.select, foot);
    this.#list.append(row.item);
    this.#rows.set(number, row);
    return row;
  }
}
