// What the buttons and filters do, and the looks of the page: light or dark, wide or narrow.
import { byId } from "./api.js";

export function listenToButtons(page) {
  const stored = localStorage.getItem("re2tal-theme");
  const dark = stored ? stored === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  const wide = matchMedia("(min-width: 761px)");
  byId("filter-box").open = wide.matches;
  wide.addEventListener("change", () => { byId("filter-box").open = wide.matches; });
  const clicks = {
    play: () => page.player.toggle(),
    loop: () => page.loop(),
    previous: () => page.step(-1),
    next: () => page.step(1),
    "next-error": () => page.nextError(),
    undo: () => page.history("undo"),
    redo: () => page.history("redo"),
    theme: toggleTheme,
    menu: () => page.showSidebar(!byId("sidebar").classList.contains("open")),
    "help-button": () => byId("help").showModal(),
    "zoom-in": () => page.timeline.setZoom(page.timeline.zoom * 1.5),
    "zoom-out": () => page.timeline.setZoom(page.timeline.zoom / 1.5),
    "zoom-all": () => page.timeline.setZoom(1),
  };
  for (const [id, act] of Object.entries(clicks)) byId(id).addEventListener("click", act);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", () => {
    byId("score-shown").textContent = Number(byId("score-filter").value).toFixed(2);
    if (page.detail) page.draw();
  });
  byId("type-filter").addEventListener("input", () => page.list.arrange());
  byId("sidebar").addEventListener("keydown", (event) => { if (event.key === "Escape") page.showSidebar(false); });
}

export function toggleTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("re2tal-theme", theme);
}
