// What the page does without the server: panels, colours, keys, addresses, files, versions.
// What it is not: a part of the conversation; no word of it is kept or sent by this script.
(() => {
  const wide = () => window.matchMedia("(min-width: 900px)").matches;
  const one = selector => document.querySelector(selector);

  function set(element, name, value) {
    if (element?.getAttribute(name) !== String(value)) element?.setAttribute(name, String(value));
  }

  function kept(name, value) {
    try {
      if (value === undefined) return localStorage.getItem(name);
      localStorage.setItem(name, value);
    } catch { /* a browser that keeps nothing */ }
    return null;
  }

  function colours(name) {
    document.body.classList.toggle("dark", name === "dark");
    document.documentElement.style.colorScheme = name;
  }

  const panels = {side: false, drawer: false};

  function panel(name, open) {
    panels[name] = open;
    if (open && !wide()) panels[name === "side" ? "drawer" : "side"] = false;
    draw();
  }

  // On the panels themselves: they come into the page later than this script.
  function draw() {
    for (const fold of document.querySelectorAll("button.label-wrap")) {
      set(fold, "aria-expanded", fold.classList.contains("open"));
    }
    for (const [name, open] of Object.entries(panels)) {
      one(`#${name}`)?.toggleAttribute("data-open", open);
      set(one(`[data-do="${name}"]`), "aria-expanded", open);
    }
  }

  const actions = {
    theme() {
      const name = document.body.classList.contains("dark") ? "light" : "dark";
      kept("m1-theme", name);
      colours(name);
    },
    side() { panel("side", !panels.side); },
    drawer() { panel("drawer", !panels.drawer); },
    language(button) {
      const at = location.pathname.replace(/\/(en|zh)\/?$/, "").replace(/\/$/, "");
      const second = /\/(en|zh)\/?$/.test(location.pathname);
      const year = 365 * 24 * 3600;  // for the server, which answers / in that language
      document.cookie = `m1-language=${button.dataset.to}; path=/; max-age=${year}; samesite=strict`;
      location.assign((second ? at || "/" : `${at}/${button.dataset.to}`) + location.search);
    },
  };

  document.addEventListener("click", event => {
    if (event.target.closest?.("button.label-wrap")) changed();
    const button = event.target.closest?.("[data-do]");
    if (button) actions[button.dataset.do]?.(button);
    // On a phone the list makes way for what was chosen from it.
    if (event.target.closest?.("#list button, #new") && !wide()) panel("side", false);
    const flip = event.target.closest?.("[data-flip]");
    if (flip) window.m1Flip?.(Number(flip.dataset.index), Number(flip.dataset.flip));
  });

  // Enter that ends the spelling of a Chinese word chooses it, and sends nothing.
  for (const kind of ["keydown", "keypress"]) {
    document.addEventListener(kind, event => {
      const spelling = event.isComposing || event.keyCode === 229;
      if (event.key === "Enter" && spelling) event.stopImmediatePropagation();
    }, true);
  }

  document.addEventListener("keydown", event => {
    if (event.key !== "Escape" || event.isComposing) return;
    const stop = one("#stop");
    if (stop?.offsetParent) stop.click();
    else if (!wide()) { panel("side", false); panel("drawer", false); }
  });

  // The address names the open conversation, so that a reload finds it again.
  window.m1Address = id => {
    const address = new URL(location.href);
    if (id) address.searchParams.set("c", id);
    else address.searchParams.delete("c");
    history.replaceState(history.state, "", address);
  };

  window.m1Save = file => {
    if (!file) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([file.text], {type: "text/plain;charset=utf-8"}));
    link.download = file.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  // ‹ 2/3 › below each message that has other versions.
  function versions() {
    const holder = one("[data-versions]");
    if (!holder) return;
    const data = JSON.parse(holder.dataset.versions);
    document.querySelectorAll("#chat .message-row").forEach((row, index) => {
      const shown = data.turns[index];
      const text = shown ? `${shown[0]}/${shown[1]}` : "";
      const below = row.nextElementSibling;
      const place = below?.classList.contains("message-buttons") ? below : row;
      let control = row.querySelector(".m1-flip") || place.querySelector(".m1-flip");
      const same = control?.dataset.text === text && control.dataset.index === String(index);
      if (shown && same && control.parentElement === place) return;
      control?.remove();
      if (!shown) return;
      control = document.createElement("div");
      control.className = "m1-flip";
      control.dataset.text = text;
      control.dataset.index = String(index);
      const step = (by, sign, label, off) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = sign;
        button.disabled = off;
        button.setAttribute("aria-label", label);
        button.dataset.flip = String(by);
        button.dataset.index = String(index);
        return button;
      };
      const middle = document.createElement("span");
      middle.textContent = text;
      control.append(step(-1, "‹", data.before, shown[0] === 1), middle,
        step(1, "›", data.after, shown[0] === shown[1]));
      place.append(control);
    });
  }

  // Gradio's names of its buttons are English, or in the browser's language; here in the page's.
  function names() {
    if (document.documentElement.lang === "en") return;
    for (const button of document.querySelectorAll("button[title], button[aria-label]")) {
      for (const attribute of ["title", "aria-label"]) {
        const name = window.m1Names[button.getAttribute(attribute)];
        if (name) set(button, attribute, name);
      }
    }
  }

  const answering = () => Boolean(one("#stop")?.checkVisibility());

  // What a screen reader says: notices as they come, and an answer once it is whole.
  let live = null;
  function announce() {
    const busy = answering();
    set(one("#chat [role=log]"), "aria-busy", busy);
    const notes = [...document.querySelectorAll("#status .m1-notes p")];
    const text = notes.map(note => note.textContent).join("\n");
    if (live && live.textContent !== text) live.textContent = text;
  }

  // Stop and Send take each other's place; the one with the keyboard's focus leaves it nowhere.
  let busy = false;
  function focus() {
    const was = busy;
    busy = answering();
    if (was && !busy && wide() && document.activeElement === document.body) {
      one("#box textarea")?.focus();
    }
  }

  // An answer changes the page 25 times a second; this follows at a slower pace.
  const PAUSE = 150;
  let planned = 0, done = -PAUSE;
  function changed() {
    if (planned) return;
    planned = setTimeout(() => {
      planned = 0;
      done = performance.now();
      for (const step of [draw, versions, names, announce, focus]) step();
    }, Math.max(0, PAUSE - (performance.now() - done)));
  }

  // Nobody means the character that keeps a tag from being one (views.py) when copying.
  function plain() {
    const clipboard = navigator.clipboard;
    if (!clipboard) return;
    const write = clipboard.writeText.bind(clipboard);
    clipboard.writeText = text => write(text.replaceAll("<\u2060", "<"));
    document.addEventListener("copy", event => {
      const text = String(getSelection());
      if (!text.includes("<\u2060")) return;
      event.clipboardData.setData("text/plain", text.replaceAll("<\u2060", "<"));
      event.preventDefault();
    });
  }

  function begin() {
    const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
    colours(kept("m1-theme") || (dark ? "dark" : "light"));
    const [, named] = /\/(en|zh)\/?$/.exec(location.pathname) || [];
    document.documentElement.lang = (named || window.m1Language) === "zh" ? "zh-Hans" : "en";
    panels.side = wide();
    draw();
    plain();
    live = document.createElement("div");
    live.className = "m1-live";
    live.setAttribute("aria-live", "polite");
    document.body.append(live);
    new MutationObserver(changed).observe(document.body, {
      childList: true, subtree: true, attributes: true, attributeFilter: ["data-versions"],
    });
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
