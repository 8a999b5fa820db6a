// What each key does, and the list of keys in the help.
import { byId, element } from "./api.js";
import { toggleTheme } from "./buttons.js";

const FRAME_SECONDS = 1 / 25;

const KEYS = [
  ["space", "play or pause"],
  ["← →", "a second back or on; with shift five"],
  [", .", "a frame back or on"],
  ["↑ ↓", "the video before or after"],
  ["n p", "next or previous action"],
  ["e", "next error, in the next video too"],
  ["l", "loop the chosen action"],
  ["a", "accept the chosen prediction as truth"],
  ["i", "add an action here"],
  ["[ ]", "let the chosen true action start or end here"],
  ["c", "change its label"],
  ["Del", "delete it"],
  ["Ctrl+z Ctrl+y", "undo, redo"],
  ["Ctrl+s", "save"],
  ["+ - 0", "zoom the time axis in, out, whole"],
  ["/", "find a video"],
  ["t ?", "light or dark; these keys"],
];

const skip = (by) => (page, event) => page.player.seek(page.player.time + by * (event.shiftKey ? 5 : 1));

/** Key -> what it does to the page. */
const ACTIONS = {
  " ": (page) => page.player.toggle(),
  ArrowLeft: skip(-1),
  ArrowRight: skip(1),
  ",": (page) => page.player.seek(page.player.time - FRAME_SECONDS),
  ".": (page) => page.player.seek(page.player.time + FRAME_SECONDS),
  ArrowUp: (page) => page.toVideo(-1),
  ArrowDown: (page) => page.toVideo(1),
  n: (page) => page.step(1),
  p: (page) => page.step(-1),
  e: (page) => page.nextError(),
  l: (page) => page.loop(),
  a: (page) => page.details.accept(),
  i: (page) => page.details.add(),
  "[": (page) => page.details.setBorder("start"),
  "]": (page) => page.details.setBorder("end"),
  c: () => { if (!byId("edit").hidden) byId("label").select(); },
  Delete: (page) => page.details.remove(),
  Backspace: (page) => page.details.remove(),
  "Ctrl+z": (page) => page.history("undo"),
  "Ctrl+y": (page) => page.history("redo"),
  "Shift+Ctrl+z": (page) => page.history("redo"),
  "Ctrl+s": (page) => page.saving.save(),
  "+": (page) => page.timeline.setZoom(page.timeline.zoom * 1.5),
  "-": (page) => page.timeline.setZoom(page.timeline.zoom / 1.5),
  0: (page) => page.timeline.setZoom(1),
  "/": (page) => {
    page.showSidebar(true);
    byId("search").focus();
  },
  t: toggleTheme,
  "?": () => byId("help").showModal(),
  Escape: (page) => page.choose(null),
};

/** Listen to keys for `page`, and list them in the help. */
export function listenToKeys(page) {
  document.addEventListener("keydown", (event) => take(page, event));
  byId("keys").append(...KEYS.flatMap(([keys, text]) => {
    const term = element("dt");
    term.append(...keys.split(" ").map((key) => element("kbd", "", key)));
    return [term, element("dd", "", text)];
  }));
}

function take(page, event) {
  if (document.querySelector("dialog[open]")) return;
  const typing = event.target.matches("input:not([type=range]), select, textarea");
  const control = event.ctrlKey || event.metaKey;
  const name = control ? `Ctrl+${event.key.toLowerCase()}` : event.key;
  if (typing && !["Ctrl+s"].includes(name)) {
    if (event.key === "Escape" || event.key === "Enter") event.target.blur();
    return;
  }
  if (event.key === " " && event.target.matches("button:not(.bar), summary, video")) return;
  if (event.target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
  const act = ACTIONS[event.shiftKey && control ? `Shift+${name}` : name];
  if (!act || event.altKey || (!page.detail && name !== "?")) return;
  event.preventDefault();
  act(page, event);
}
