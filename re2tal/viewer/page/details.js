// The panel of the chosen action: what it is, and how it is corrected.
import { byId, element } from "./api.js";
import { toAction } from "./edits.js";
import { describe } from "./timeline.js";

const sameSpan = (one, other) => one.label === other.label && one.start === other.start && one.end === other.end;

export class Details {
  /** `page` has the open video: detail, chosen, shown(), change(actions, chosen), say(text, bad), player. */
  constructor(page) {
    this.page = page;
    byId("edit").addEventListener("submit", (event) => event.preventDefault());
    for (const id of ["label", "start", "end"]) byId(id).addEventListener("change", () => this.take());
    byId("delete").addEventListener("click", () => this.remove());
    byId("accept").addEventListener("click", () => this.accept());
    byId("accept-shown").addEventListener("click", () => this.acceptShown());
    byId("add").addEventListener("click", () => this.add());
  }

  show() {
    const { chosen, detail } = this.page;
    const isTruth = Boolean(chosen) && chosen.score === undefined;
    const editable = detail !== null && detail.duration !== null;
    const hint = editable ? "Choose an action on the time axis, or add one." : "";
    byId("chosen").textContent = chosen ? describe(chosen) : hint;
    byId("locked").hidden = editable || detail === null;
    byId("edit").hidden = !isTruth;
    byId("accept").hidden = !chosen || isTruth;
    for (const id of ["accept", "accept-shown", "add", "delete", "label", "start", "end"]) byId(id).disabled = !editable;
    // Once: the page is drawn again when the server has typed the predictions, and somebody may be writing by then.
    if (isTruth && chosen !== this.filled) this.fill(chosen);
    this.filled = isTruth ? chosen : null;
  }

  fill(action) {
    byId("label").value = action.label;
    byId("start").value = action.start.toFixed(2);
    byId("end").value = action.end.toFixed(2);
  }

  labels(names) {
    byId("labels").replaceChildren(...names.map((name) => Object.assign(element("option"), { value: name })));
  }

  /** Take what was typed, or say why not and put the old values back. */
  take() {
    const { chosen } = this.page;
    const label = byId("label").value.trim();
    const typed = (id, value) => (byId(id).value === value.toFixed(2) ? value : Number(byId(id).value));
    this.replace(chosen, { label, start: typed("start", chosen.start), end: typed("end", chosen.end) });
  }

  /** Replace an action by one with other values. */
  replace(action, values) {
    const { actions, duration } = this.page.detail;
    const { label, start, end } = { ...action, ...values };
    if (sameSpan(action, { label, start, end })) return;
    if (!label) this.page.say("An action needs a label.", true);
    else if (!(start >= 0 && start < end && end <= duration)) {
      this.page.say(`An action starts before it ends, between 0 and ${duration.toFixed(2)} s.`, true);
    } else {
      const changed = toAction([start, end, label]);
      this.page.change(actions.map((one) => (one === action ? changed : one)), changed);
      return;
    }
    this.filled = null;
    this.show();
  }

  /** Let the chosen action start or end where the video is. */
  setBorder(side) {
    const { chosen, detail, player } = this.page;
    const here = Math.min(Math.round(player.time * 1000) / 1000, detail.duration);
    if (chosen && chosen.score === undefined) this.replace(chosen, { [side]: here });
  }

  remove() {
    const { chosen, detail } = this.page;
    if (!chosen || chosen.score !== undefined) return;
    this.page.change(detail.actions.filter((one) => one !== chosen), null);
  }

  accept() {
    const { chosen } = this.page;
    if (chosen?.score !== undefined) this.acceptAll([chosen]);
  }

  acceptShown() {
    this.acceptAll(this.page.shown());
  }

  /** Copy predictions to the truth, cut to the video; those that are there already are not doubled. */
  acceptAll(predictions) {
    const { actions, duration } = this.page.detail;
    if (duration === null) return;
    const added = [];
    for (const { start, end, label } of predictions) {
      const action = toAction([Math.max(start, 0), Math.min(end, duration), label]);
      const known = [...actions, ...added].some((one) => sameSpan(one, action));
      if (!known && action.start < action.end) added.push(action);
    }
    if (!added.length) this.page.say("Nothing to accept that is not there already.");
    else {
      this.page.change([...actions, ...added], added[0]);
      this.page.say(`${added.length} accepted as truth.`);
    }
  }

  /** A new action where the video is, with the label that was used last. */
  add() {
    const { detail, chosen, player, classes } = this.page;
    if (detail.duration === null) return;
    const length = Math.min(2, detail.duration / 10);
    const start = Math.min(Math.round(player.time * 1000) / 1000, detail.duration - length);
    const label = chosen?.label ?? byId("class-filter").value ?? "";
    const action = toAction([start, Math.min(start + length, detail.duration), label || classes[0] || "action"]);
    this.page.change([...detail.actions, action], action);
    byId("label").focus();
    byId("label").select();
  }
}
