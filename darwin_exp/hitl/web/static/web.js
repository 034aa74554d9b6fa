"use strict";
// Parts of a page marked data-live are fetched again every two seconds; all else works without this.
(() => {
  const root = document.documentElement;
  const remember = (value) => { try { localStorage.setItem("darwin-theme", value); } catch { /* not allowed */ } };
  const recalled = () => { try { return localStorage.getItem("darwin-theme"); } catch { return null; } };
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (recalled()) root.dataset.theme = recalled();
  const theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
  });

  const inWords = (seconds) => {
    const whole = Math.max(0, Math.round(seconds));
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min`;
    if (whole < 172800) return `${Math.floor(whole / 3600)} h ${Math.floor(whole % 3600 / 60)} min`;
    return `${Math.floor(whole / 86400)} days`;
  };
  const tellAges = () => {
    for (const one of document.querySelectorAll("[data-since]")) {
      one.textContent = inWords(Date.now() / 1000 - Number(one.dataset.since));
    }
  };

  const connection = document.getElementById("connection");
  const title = document.title;
  const tellWaiting = (n) => {
    if (n === null) return;
    for (const one of document.querySelectorAll(".count")) one.textContent = n === "0" ? "" : n;
    document.title = n === "0" ? title : `(${n}) ${title}`;
  };
  const isBusy = (box) => {
    const chosen = getSelection();
    return box.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")
      || !chosen.isCollapsed && box.contains(chosen.anchorNode);
  };
  const put = (box, text) => {
    const fresh = new DOMParser().parseFromString(text, "text/html").body;
    const open = [...box.querySelectorAll("details[open][id]")].map((one) => one.id);
    const scrolled = [...box.querySelectorAll(".scroll, .tree")].map((one) => [one.scrollLeft, one.scrollTop]);
    const focused = box.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    box.replaceChildren(...fresh.childNodes);
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    [...box.querySelectorAll(".scroll, .tree")].forEach((one, k) => {
      if (scrolled[k]) [one.scrollLeft, one.scrollTop] = scrolled[k];
    });
    if (focused) box.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  };
  const refresh = async (box) => {
    const address = `${box.dataset.live}?seen=${encodeURIComponent(box.dataset.seen || "")}`;
    const answer = await fetch(address, { credentials: "same-origin", cache: "no-store" });
    if (answer.status === 403) return "This session has ended: open the link of a fresh serve.";
    if (!answer.ok) return "This page cannot be refreshed just now.";
    tellWaiting(answer.headers.get("x-waiting"));
    if (answer.status === 200) {
      const text = await answer.text();
      if (!isBusy(box)) {
        put(box, text);
        box.dataset.seen = answer.headers.get("x-seen") || "";
      }
    }
    return "";
  };
  let busy = false;
  const refreshAll = async () => {
    if (document.hidden || busy) return;
    busy = true;
    let words = "";
    for (const box of document.querySelectorAll("[data-live]")) {
      try {
        words = await refresh(box) || words;
      } catch {
        words = "serve does not answer: what is shown may be old.";
      }
    }
    connection.textContent = words;
    connection.className = words ? "notice bad" : "";
    busy = false;
    tellAges();
  };
  tellAges();
  setInterval(refreshAll, 2000);
  setInterval(tellAges, 1000);
  document.addEventListener("visibilitychange", refreshAll);
  refreshAll();

  // j and k walk through what waits, as in many readers; Enter opens it.
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select")) return;
    const links = [...document.querySelectorAll(".requests a.what")];
    if (!links.length || !["j", "k"].includes(event.key)) return;
    const at = links.indexOf(document.activeElement);
    links[Math.min(links.length - 1, Math.max(0, at + (event.key === "j" ? 1 : -1)))].focus();
  });
})();
