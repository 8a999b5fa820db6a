// Saving, and what to do when somebody else saved the same file.
import { byId, count, element, request } from "./api.js";

export class Saving {
  /** `page` has edits, revision, saveTo, videos, say(text, bad), reload(), refresh(). */
  constructor(page) {
    this.page = page;
    this.busy = false;
    byId("save").addEventListener("click", () => this.save());
    byId("download").addEventListener("click", () => this.download());
    const answers = {
      merge: () => this.save(true),
      reload: () => this.page.reload(true),
      keep: () => this.download(),
      later: () => {},
    };
    for (const [id, answer] of Object.entries(answers)) {
      byId(id).addEventListener("click", () => {
        byId("conflict").close();
        answer();
      });
    }
    window.addEventListener("beforeunload", (event) => {
      if (this.page.edits.unsaved().length) event.preventDefault();
    });
    window.addEventListener("focus", () => this.look());
    setInterval(() => { if (!document.hidden) this.look(); }, 10_000);
  }

  show() {
    const number = this.page.edits.unsaved().length;
    byId("save").disabled = byId("download").disabled = !number;
    byId("save").textContent = number ? `Save (${number})` : "Save";
    byId("save").title = `${count(number, "corrected video")} to ${this.page.saveTo}`;
  }

  async save(merge = false) {
    const edits = this.page.edits.unsaved();
    if (!edits.length || this.busy) return;
    this.busy = true;
    try {
      const answer = await request("api/save", { revision: merge ? this.theirs : this.page.revision, edits, merge });
      this.page.revision = answer.revision;
      if (merge) {
        this.page.edits.clear();
        await this.page.reload(false);
      } else {
        this.page.edits.saved(edits);
        await this.page.refresh();
        await this.page.retype();
      }
      this.page.say(`Saved ${count(edits.length, "corrected video")} to ${answer.path}`);
    } catch (error) {
      if (error.status === 409) this.ask(error.content);
      else this.page.say(`Not saved: ${error.message}. Download keeps your corrections.`, true);
    } finally {
      this.busy = false;
      this.show();
    }
  }

  ask({ revision, both }) {
    this.theirs = revision;
    const mine = this.page.edits.unsaved().length;
    const shared = both.length
      ? ` Both changed ${both.slice(0, 5).join(", ")}${both.length > 5 ? ", ..." : ""}: merged, such a video has the changes ` +
        "of both, so look at it again afterwards."
      : " No video was changed by both.";
    byId("conflict-text").textContent =
      `Another program, or another page, saved ${this.page.saveTo} since you began; you have ${count(mine, "corrected video")}.${shared}`;
    byId("conflict").showModal();
  }

  async download() {
    const edits = this.page.edits.unsaved();
    try {
      const { name, document: content } = await request("api/download", { edits });
      const link = element("a");
      link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
      this.page.say(`${name}: all annotations with your ${count(edits.length, "corrected video")}; nothing was saved on the server.`);
    } catch (error) {
      this.page.say(`Nothing was downloaded: ${error.message}`, true);
    }
  }

  /** Notice that the file was changed on the disk. */
  async look() {
    if (this.busy || !this.page.revision) return;
    let answer;
    try {
      answer = await request("api/state");
    } catch (error) {
      this.page.say(error.message, true);
      return;
    }
    if (this.busy || answer.revision === this.page.revision || answer.revision === this.seen) return;
    this.seen = answer.revision;
    if (this.page.edits.unsaved().length) {
      this.page.say("The annotations were changed by another program; saving will ask how to go on.", true);
    } else {
      await this.page.reload(true);
      this.page.say("The annotations were changed by another program; this is the new state.");
    }
  }
}
