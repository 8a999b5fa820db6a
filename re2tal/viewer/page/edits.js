// Corrections that are not saved yet: per video the actions it began from, those it has now, and the way between.

let lastId = 0;

/** [start, end, label] -> an action that can be told from its equals. */
export const toAction = ([start, end, label]) => ({ id: ++lastId, start, end, label });

const toRow = ({ start, end, label }) => [start, end, label];

const sameRows = (one, other) => {
  const sorted = (rows) => JSON.stringify(rows.map((row) => JSON.stringify(row)).sort());
  return sorted(one) === sorted(other);
};

export class Edits {
  constructor() {
    this.videos = new Map();
  }

  /** The actions of a video as they stand, or null where nobody has touched it. */
  actions(video) {
    return this.videos.get(video)?.actions ?? null;
  }

  /** Replace the actions of a video; `before` are those that are shown now. */
  change(video, before, after) {
    const edit = this.videos.get(video) ?? { base: before.map(toRow), actions: before, past: [], future: [] };
    edit.past.push(edit.actions);
    edit.future = [];
    edit.actions = after;
    this.videos.set(video, edit);
  }

  canUndo(video) {
    return Boolean(this.videos.get(video)?.past.length);
  }

  canRedo(video) {
    return Boolean(this.videos.get(video)?.future.length);
  }

  undo(video) {
    const edit = this.videos.get(video);
    edit.future.push(edit.actions);
    edit.actions = edit.past.pop();
  }

  redo(video) {
    const edit = this.videos.get(video);
    edit.past.push(edit.actions);
    edit.actions = edit.future.pop();
  }

  isDirty(video) {
    const edit = this.videos.get(video);
    return edit !== undefined && !sameRows(edit.base, edit.actions.map(toRow));
  }

  /** What there is to save, as the server takes it. */
  unsaved() {
    return [...this.videos]
      .filter(([video]) => this.isDirty(video))
      .map(([video, edit]) => ({ video, base: edit.base, actions: edit.actions.map(toRow) }));
  }

  /** These edits are in the file now; what was changed since stays unsaved. */
  saved(sent) {
    for (const { video, actions } of sent) this.videos.get(video).base = actions;
  }

  clear() {
    this.videos.clear();
  }
}
