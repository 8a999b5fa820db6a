// What the filters leave of a video, and what the colours mean.
import { byId, element } from "./api.js";

const DEFAULT_MOST = 50;

/** The predictions that the filters leave; `predictions` are sorted, best first. */
export function leftPredictions(predictions) {
  const [label, type] = [byId("class-filter").value, byId("type-filter").value];
  const slider = byId("score-filter");
  const least = slider.value === slider.min ? -Infinity : Number(slider.value);
  return predictions
    .filter((one) => one.score >= least && (!label || one.label === label) && (!type || !one.type || one.type === type))
    .slice(0, Math.max(1, byId("most-filter").valueAsNumber || DEFAULT_MOST));
}

/** The true actions that the filters leave. */
export function leftActions(actions) {
  const label = byId("class-filter").value;
  const onlyMissed = byId("type-filter").value === "missed";
  return actions.filter((one) => (!label || one.label === label) && (!onlyMissed || one.missed));
}

/** `judged`: predictions are right or wrong, not just predicted. */
export function drawLegend(judged) {
  const entries = judged
    ? [["truth", "true"], ["truth missed", "true, missed"], ["right", "right"], ["wrong", "wrong"]]
    : [["truth", "true"], ["prediction", "predicted"]];
  byId("legend").replaceChildren(...entries.map(([kind, text]) => element("li", kind, text)));
}

/** Fill a select with names, behind its first entry; what was chosen stays. */
export function fill(id, names) {
  const select = byId(id);
  const chosen = select.value;
  select.length = 1;
  select.append(...names.map((name) => Object.assign(element("option", "", name), { value: name })));
  select.value = names.includes(chosen) ? chosen : "";
}
