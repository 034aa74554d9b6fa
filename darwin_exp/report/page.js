"use strict";
(() => {
  const root = document.documentElement;
  const remember = (value) => { try { localStorage.setItem("darwin-theme", value); } catch { /* a sandboxed frame */ } };
  const recalled = () => { try { return localStorage.getItem("darwin-theme"); } catch { return null; } };
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (recalled()) root.dataset.theme = recalled();
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
  });

  // Where an agent's mark leads: its row, made visible whatever the filter says.
  const table = document.querySelector("#individuals table");
  const body = table.tBodies[0];
  const words = document.getElementById("filter"), status = document.getElementById("status");
  const count = document.getElementById("count");
  const rows = [...body.rows];
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits = (!status.value || row.dataset.status === status.value)
        && wanted.every((word) => text.get(row).includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  words.addEventListener("input", filter);
  status.addEventListener("change", filter);
  filter();

  const find = (id) => {
    const row = document.getElementById(id);
    if (!row) return;
    if (row.hidden) { words.value = ""; status.value = ""; filter(); }
    for (let up = row.parentElement; up; up = up.parentElement) if (up.tagName === "DETAILS") up.open = true;
    for (const old of document.querySelectorAll("tr.found")) old.classList.remove("found");
    if (row.tagName === "TR") row.classList.add("found");
    row.scrollIntoView({ block: row.tagName === "TR" ? "center" : "start" });
  };
  // Fragments do not work in every frame that shows artifacts, so links within the page are ours.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (!link) return;
    event.preventDefault();
    find(link.getAttribute("href").slice(1));
  });

  const number = (cell) => cell.dataset.v === undefined || cell.dataset.v === "" ? null : Number(cell.dataset.v);
  for (const head of table.tHead.rows[0].cells) {
    head.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending", k = head.cellIndex;
      const numeric = head.classList.contains("num");
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.sort((one, two) => {
        if (!numeric) {
          return (up ? 1 : -1) * one.cells[k].textContent.localeCompare(two.cells[k].textContent);
        }
        const a = number(one.cells[k]), b = number(two.cells[k]);
        if (a === null || b === null) return (a === null) - (b === null); // unknown comes last
        return up ? a - b : b - a;
      });
      body.append(...rows);
    });
  }

  const hover = document.createElement("div");
  hover.id = "hover";
  hover.hidden = true;
  document.body.append(hover);
  const tell = (row) => {
    const cell = (k) => row.cells[k].textContent.trim();
    const lines = [`${row.id}  ${cell(6)}`, cell(5)];
    if (cell(7) !== "-") lines.push(`perplexity ${cell(7)}` + (cell(8) !== "–" ? ` (${cell(8)} against parent)` : ""));
    if (cell(10) !== "-") lines.push(`MFU ${cell(10)}`);
    if (cell(2)) lines.push(`from ${cell(2)}, edited by ${cell(4)}`);
    return lines.join("\n");
  };
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest && event.target.closest("svg a");
    const row = mark && document.getElementById(mark.getAttribute("href").slice(1));
    hover.hidden = !row;
    if (!row) return;
    hover.textContent = tell(row);
    const box = hover.getBoundingClientRect();
    hover.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
    hover.style.top = `${event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16}px`;
  });

  for (const tools of document.querySelectorAll("[data-zooms]")) {
    const svg = document.getElementById(tools.dataset.zooms).querySelector("svg");
    const natural = svg.viewBox.baseVal.width, ratio = svg.viewBox.baseVal.height / natural;
    let scale = 1;
    const set = (to) => {
      scale = Math.max(.05, Math.min(4, to));
      svg.setAttribute("width", natural * scale);
      svg.setAttribute("height", natural * ratio * scale);
    };
    tools.addEventListener("click", (event) => {
      const what = event.target.dataset.zoom, box = svg.parentElement;
      if (what === "in") set(scale * 1.3);
      if (what === "out") set(scale / 1.3);
      if (what === "same") set(1);
      if (what === "fit") {
        const high = .78 * innerHeight;
        set(Math.min(box.clientWidth / natural, high / (natural * ratio)));
      }
    });
  }

  for (const button of document.querySelectorAll(".copy button")) {
    button.addEventListener("click", async () => {
      const pre = button.parentElement.querySelector("pre");
      try {
        await navigator.clipboard.writeText(pre.textContent);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(pre); // where the clipboard is out of reach
      }
    });
  }
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details:not(.everyone)")) one.open = true;
  });
})();
