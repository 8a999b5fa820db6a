// The page: which video is open, what of it is shown, and what its buttons do.
import { byId, element, request } from "./api.js";
import { listenToButtons } from "./buttons.js";
import { Details } from "./details.js";
import { Edits, toAction } from "./edits.js";
import { drawLegend, fill, leftActions, leftPredictions } from "./filters.js";
import { listenToKeys } from "./keys.js";
import { VideoList } from "./list.js";
import { Player } from "./player.js";
import { Saving } from "./saving.js";
import { Timeline } from "./timeline.js";

const RIGHT = "true positive";

class Page {
  constructor() {
    this.videos = [];
    this.classes = [];
    this.types = [];
    this.index = -1;
    this.detail = null;
    this.chosen = null;
    this.edits = new Edits();
    this.player = new Player((time) => this.timeline.moveTo(time, this.player.playing));
    this.timeline = new Timeline({
      seek: (time) => this.player.seek(time),
      choose: (item) => this.choose(item),
      loop: (item) => this.loop(item),
      change: (action, start, end) => this.details.replace(action, { start, end }),
    });
    this.list = new VideoList((index) => {
      this.showSidebar(false);
      this.open(index);
    });
    this.details = new Details(this);
    this.saving = new Saving(this);
    listenToButtons(this);
    listenToKeys(this);
  }

  async start() {
    await this.refresh();
    const list = byId("notes").querySelector("ul");
    list.replaceChildren(...this.notes.map((note) => element("li", "", note)));
    byId("notes").hidden = !this.notes.length;
    byId("notes").querySelector("summary").textContent = this.notes.length === 1 ? this.notes[0] : `${this.notes.length} notes`;
    byId("notes").classList.toggle("single", this.notes.length === 1);
    list.hidden = this.notes.length === 1;
    const before = location.hash ? Number(location.hash.slice(1)) : -1; // the page was reloaded
    if (this.videos.length) await this.open(this.videos[before] ? before : this.list.order[0]);
    else this.say("The results name no video, and neither do the annotations.", true);
  }

  /** Fetch the list again, after a save for instance. */
  async refresh() {
    const { videos, classes, types, ...rest } = await request("api/videos");
    Object.assign(this, { videos, classes, types, notes: rest.notes, saveTo: rest.saveTo, revision: rest.revision });
    byId("title").textContent = rest.title;
    document.title = `${rest.title} - re2tal view`;
    byId("help-save").textContent =
      `Right is a prediction of the right class with a temporal IoU of ${rest.tiou} or more; the other types are DETAD's. ` +
      `Corrections are saved to ${rest.saveTo}.`;
    fill("class-filter", classes);
    fill("type-filter", types);
    byId("score-filter").max = videos.reduce((most, video) => Math.max(most, video.best ?? 0), 1);
    this.details.labels(classes);
    this.markDirty();
    this.list.show(videos);
    this.saving.show();
    byId("next-error").disabled = !videos.some((video) => video.annotated);
  }

  /** Read everything again; `drop` forgets unsaved corrections. */
  async reload(drop) {
    if (drop) this.edits.clear();
    await this.refresh();
    if (this.index >= 0) await this.open(Math.min(this.index, this.videos.length - 1), true);
  }

  async open(index, stay = false) {
    const time = this.player.time;
    const isSame = stay && index === this.index;
    let detail;
    this.wanted = index;
    try {
      detail = await request(`api/video/${index}`);
    } catch (error) {
      this.say(error.message, true);
      return;
    }
    if (this.wanted !== index) return; // another one was opened meanwhile
    this.index = index;
    history.replaceState(null, "", `#${index}`);
    this.chosen = null;
    const actions = this.edits.actions(index) ?? detail.actions.map(toAction);
    const predictions = detail.predictions
      .map(([start, end, score, label], place) => ({ start, end, score, label, place, type: null }))
      .sort((one, other) => other.score - one.score);
    this.detail = { duration: detail.duration, actions, predictions };
    this.setTypes(detail);
    byId("name").textContent = this.videos[index].id;
    this.timeline.zoom = 1;
    this.timeline.inner.style.width = "";
    this.setLoop(null);
    this.timeline.time = 0;
    if (!isSame) this.player.open(this.videos[index].media ? `media/${index}` : null, this.end());
    this.list.choose(index);
    this.draw();
    if (isSame) this.player.seek(time);
    if (this.edits.isDirty(index)) await this.retype();
  }

  end() {
    const { duration, actions, predictions } = this.detail;
    // Starts too, as a prediction may end before it starts. Not as arguments of one call, which takes some 100,000.
    const later = (last, one) => Math.max(last, one.start, one.end);
    return [...actions, ...predictions].reduce(later, Math.max(duration ?? 0, 0.1));
  }

  setTypes({ types, missed }) {
    for (const one of this.detail.predictions) one.type = types ? this.types[types[one.place]] : null;
    this.detail.actions.forEach((one, place) => { one.missed = Boolean(types && missed[place]); });
  }

  /** Ask for the types against the actions as they are now. */
  async retype() {
    const { index, detail } = this;
    const { actions } = detail;
    const rows = actions.map(({ start, end, label }) => [start, end, label]);
    try {
      const typed = await request("api/types", { video: index, actions: rows });
      if (this.detail !== detail || detail.actions !== actions) return;
      this.setTypes(typed);
      this.draw();
    } catch (error) {
      this.say(error.message, true);
    }
  }

  shown() {
    return leftPredictions(this.detail.predictions);
  }

  draw() {
    const { actions, predictions, duration } = this.detail;
    const shown = this.shown();
    const truths = leftActions(actions);
    const byTime = [...truths].sort((one, other) => one.start - other.start);
    const labels = [...new Set([...byTime, ...shown].map((one) => one.label))];
    const rows = labels.map((name) => ({
      label: name,
      actions: byTime.filter((one) => one.label === name),
      predictions: shown.filter((one) => one.label === name),
    }));
    const nothing = predictions.length || actions.length ? "The filters leave nothing." : "Nothing is predicted or annotated here.";
    this.items = [...truths, ...shown].sort((one, other) => one.start - other.start || one.end - other.end);
    if (!this.items.includes(this.chosen)) this.chosen = null;
    this.timeline.draw({ rows, duration, end: this.end(), chosen: this.chosen, nothing });
    for (const id of ["shown", "shown-too"]) byId(id).textContent = `${shown.length} of ${predictions.length} predictions`;
    drawLegend(predictions.some((one) => one.type));
    this.details.show();
    this.showHistory();
  }

  choose(item, seek = true) {
    this.chosen = item;
    this.setLoop(null);
    this.say("");
    if (item && seek) this.player.seek(item.start);
    this.timeline.choose(item);
    this.details.show();
  }

  step(by) {
    if (!this.items?.length) return;
    const here = this.items.indexOf(this.chosen);
    const first = by > 0 ? this.items.findIndex((one) => one.start >= this.player.time) : -1;
    const place = here >= 0 ? here + by : first >= 0 ? first : by > 0 ? 0 : this.items.length - 1;
    this.choose(this.items[(place + this.items.length) % this.items.length]);
  }

  errorsHere() {
    return this.items.filter((one) => (one.score === undefined ? one.missed : one.type && one.type !== RIGHT));
  }

  /** The next error of this video, or of the next video that has one that the filters show. */
  async nextError() {
    if (!this.detail) return;
    const errors = this.errorsHere();
    const here = this.items.indexOf(this.chosen);
    const later = errors.find((one) => this.items.indexOf(one) > here);
    if (later) return this.choose(later);
    const order = this.list.order;
    const from = order.indexOf(this.index);
    for (let step = 1; step <= order.length; step++) {
      const index = order[(from + step) % order.length];
      const { types, dirty } = this.videos[index]; // the types are those of what is saved
      if (!dirty && !Object.keys(types).some((type) => type !== RIGHT)) continue;
      await this.open(index);
      const found = this.errorsHere();
      if (found.length) return this.choose(found[0]);
    }
    this.say("No other error is shown; the filters may hide some.");
  }

  loop(item = this.chosen) {
    if (this.player.span || !item) {
      this.setLoop(null);
      return;
    }
    this.choose(item);
    this.setLoop(item);
  }

  setLoop(item) {
    this.player.loop(item);
    byId("loop").setAttribute("aria-pressed", String(Boolean(item)));
  }

  /** Take a correction of the open video. */
  change(actions, chosen) {
    this.edits.change(this.index, this.detail.actions, actions);
    this.takeEdited(chosen);
  }

  history(direction) {
    const can = direction === "undo" ? this.edits.canUndo(this.index) : this.edits.canRedo(this.index);
    if (!can) return;
    this.edits[direction](this.index);
    this.takeEdited(null);
    this.say(direction === "undo" ? "Undone." : "Redone.");
  }

  takeEdited(chosen) {
    this.detail.actions = this.edits.actions(this.index);
    this.chosen = chosen;
    this.say("");
    const known = new Set(this.classes);
    const added = [...new Set(this.detail.actions.map((one) => one.label))].filter((label) => !known.has(label));
    if (added.length) {
      this.classes = [...this.classes, ...added];
      this.details.labels(this.classes);
      fill("class-filter", this.classes);
    }
    if (chosen && byId("class-filter").value && byId("class-filter").value !== chosen.label) byId("class-filter").value = "";
    this.markDirty();
    this.list.redraw();
    this.saving.show();
    this.draw();
    this.retype();
  }

  markDirty() {
    this.videos.forEach((video, index) => { video.dirty = this.edits.isDirty(index); });
  }

  showHistory() {
    byId("undo").disabled = !this.edits.canUndo(this.index);
    byId("redo").disabled = !this.edits.canRedo(this.index);
  }

  say(text, bad = false) {
    byId("status").textContent = text;
    byId("status").classList.toggle("bad", bad);
  }

  showSidebar(open) {
    byId("sidebar").classList.toggle("open", open);
    byId("menu").setAttribute("aria-expanded", String(open));
    if (open) this.list.draw();
  }

  toVideo(step) {
    const index = this.list.neighbour(step);
    if (index >= 0) this.open(index);
  }
}

const page = new Page();
page.start().catch((error) => page.say(error.message, true));
