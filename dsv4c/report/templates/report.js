"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const one = (id) => document.getElementById(id);
  root.classList.add("js");

  function element(tag, text, parent, cls) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (cls) made.className = cls;
    if (parent) parent.append(made);
    return made;
  }
  function listed(pairs, title, into) {
    into.replaceChildren();
    element("h4", title, into);
    const list = element("dl", undefined, into);
    for (const [name, value] of pairs) {
      const pair = element("div", undefined, list);
      element("dt", name, pair);
      element("dd", value, pair, name === "does" || name === "why" ? "prose" : "");
    }
  }

  // colours: as the system, then the other way round, then back
  const themes = ["", "light", "dark"];
  one("theme").addEventListener("click", (event) => {
    const now = themes[(themes.indexOf(root.dataset.theme || "") + 1) % 3];
    if (now) root.dataset.theme = now; else delete root.dataset.theme;
    event.target.textContent = "Colours: " + (now || "auto");
    event.target.setAttribute("aria-label", "Colours: " + (now || "as the system"));
  });

  // what is wider than the page scrolls by keyboard too
  const sized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0; else target.removeAttribute("tabindex");
    }
  });
  all(".scroll").forEach((box) => sized.observe(box));

  // contents: closed on a phone, arrow keys, where the reader is
  const contents = document.querySelector(".contents details");
  const narrow = matchMedia("(max-width: 900px)");
  const fold = () => { contents.open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();
  const links = all(".toc a");
  contents.addEventListener("keydown", (event) => {
    const at = links.indexOf(document.activeElement);
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (at < 0 || !step) return;
    event.preventDefault();
    links[(at + step + links.length) % links.length].focus();
  });
  contents.addEventListener("click", (event) => {
    if (narrow.matches && event.target.closest("a")) contents.open = false;
  });
  const watched = links.map((link) => document.querySelector(link.getAttribute("href")));
  const seen = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) seen[entry.isIntersecting ? "add" : "delete"](entry.target);
    const here = watched.findLastIndex((target) => seen.has(target));
    links.forEach((link, i) => {
      link.classList.toggle("here", i === here);
      if (i === here) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    });
  }, { rootMargin: "0px 0px -90% 0px" });
  watched.forEach((target) => watcher.observe(target));

  // passes: a link to one opens it
  function reveal() {
    const target = location.hash ? one(decodeURIComponent(location.hash.slice(1))) : null;
    if (target && target.matches("details")) {
      target.open = true;
      target.scrollIntoView();
      target.querySelector("summary").focus({ preventScroll: true });
    }
  }
  addEventListener("hashchange", reveal);
  for (const link of all('a[href^="#pass-"]')) {
    link.addEventListener("click", () => { if (link.hash === location.hash) reveal(); });
  }
  for (const button of all("[data-all]")) {
    button.addEventListener("click", () => all(".pass").forEach((pass) => { pass.open = !!button.dataset.all; }));
  }

  // tabs
  for (const tabs of all('[role="tablist"]')) {
    const held = all('[role="tab"]', tabs);
    const choose = (tab, focus) => {
      for (const other of held) {
        other.setAttribute("aria-selected", other === tab);
        other.tabIndex = other === tab ? 0 : -1;
        one(other.getAttribute("aria-controls")).classList.toggle("later", other !== tab);
      }
      if (focus) tab.focus();
    };
    tabs.addEventListener("click", (event) => { const tab = event.target.closest('[role="tab"]'); if (tab) choose(tab); });
    tabs.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      choose(held[(held.indexOf(document.activeElement) + step + held.length) % held.length], true);
    });
  }

  // graph: frames of one sublayer; left and right step, up and down walk the boxes
  const canvas = one("canvas"), select = one("sublayer"), strip = one("frames"), told = one("frame"), detail = one("box");
  let frames = [], at = 0, box = -1;
  function exchange(parent, sign, text) {
    if (text) element(sign === "-" ? "s" : "u", ` ${sign} ${text}`, parent);
  }
  function show(number, keep) {
    at = Math.max(0, Math.min(frames.length - 1, number));
    frames.forEach((svg, i) => { svg.toggleAttribute("hidden", i !== at); });
    const svg = frames[at];
    told.replaceChildren();
    element("b", svg.dataset.stage, told);
    element("span", ` ${at + 1} of ${frames.length}`, told, "none");
    exchange(told, "-", svg.dataset.gone);
    exchange(told, "+", svg.dataset.came);
    all("button", strip).forEach((button, i) => button.setAttribute("aria-pressed", i === at));
    one("back").disabled = at === 0;
    one("next").disabled = at === frames.length - 1;
    pick(keep ? box : -1);
    if (box < 0) explain(svg);
  }
  function explain(svg) {
    const pairs = [["does", svg.dataset.say]];
    if (svg.dataset.gone) pairs.push(["takes away", svg.dataset.gone]);
    if (svg.dataset.came) pairs.push(["puts in", svg.dataset.came]);
    pairs.push(["boxes", String(all("g", svg).length)]);
    listed(pairs, svg.dataset.stage, detail);
    const link = element("a", "What it changed in the text", detail);
    link.href = one("pass-" + svg.dataset.stage) ? "#pass-" + svg.dataset.stage : "#passes";
    element("p", "Click a box, or press the down arrow in the graph, to read what it is.", detail, "none");
    centre(svg);
  }
  function centre(svg) {
    const held = all(".new", svg), shown = (held.length ? held : all("g", svg).slice(0, 1)).map((g) => g.transform.baseVal[0].matrix);
    if (!shown.length) return;
    const mean = shown.reduce((sum, m) => sum + m.e, 0) / shown.length + 50;
    canvas.scrollLeft = mean - canvas.clientWidth / 2;
    canvas.scrollTop = Math.max(0, Math.min(...shown.map((m) => m.f)) - canvas.clientHeight / 2);
  }
  function pick(number) {
    all(".sel, .on", canvas).forEach((part) => part.classList.remove("sel", "on"));
    const boxes = all("g", frames[at]);
    box = number < 0 ? -1 : Math.min(number, boxes.length - 1);
    if (box < 0) return;
    const chosen = boxes[box];
    chosen.classList.add("sel");
    all(`path[data-a="${box}"], path[data-b="${box}"]`, frames[at]).forEach((path) => path.classList.add("on"));
    const [label, note] = all("text", chosen).map((text) => text.textContent);
    listed(chosen.dataset.facts ? JSON.parse(chosen.dataset.facts) : [["", note]], label, detail);
    const edge = chosen.getBoundingClientRect(), view = canvas.getBoundingClientRect();
    if (edge.top < view.top || edge.bottom > view.bottom) canvas.scrollTop += edge.top - view.top - view.height / 3;
    if (edge.left < view.left || edge.right > view.right) canvas.scrollLeft += edge.left - view.left - view.width / 3;
  }
  function choose(name, stage) {
    select.value = name;
    all("svg", canvas).forEach((svg) => svg.setAttribute("hidden", ""));
    frames = all("svg", canvas).filter((svg) => svg.dataset.of === name);
    strip.replaceChildren(...frames.map((svg, i) => {
      const item = document.createElement("li");
      element("button", svg.dataset.stage, item).addEventListener("click", () => show(i, true));
      return item;
    }));
    const found = frames.findIndex((svg) => svg.dataset.stage === stage);
    show(Math.max(0, found));
  }
  if (select.options.length) {
    select.addEventListener("change", () => choose(select.value, frames[at].dataset.stage));
    one("back").addEventListener("click", () => show(at - 1, true));
    one("next").addEventListener("click", () => show(at + 1, true));
    one("fit").addEventListener("change", (event) => canvas.classList.toggle("fit", event.target.checked));
    canvas.addEventListener("click", (event) => {
      const chosen = event.target.closest("g");
      if (chosen) pick(all("g", frames[at]).indexOf(chosen));
    });
    canvas.addEventListener("keydown", (event) => {
      const act = {
        ArrowLeft: () => show(at - 1, true), ArrowRight: () => show(at + 1, true),
        ArrowUp: () => pick(Math.max(0, box - 1)), ArrowDown: () => pick(box + 1),
        Home: () => show(0, true), End: () => show(frames.length - 1, true),
      }[event.key];
      if (!act || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      act();
    });
    for (const link of all("[data-show]")) {
      link.addEventListener("click", () => { choose(link.dataset.show, link.dataset.stage); canvas.focus({ preventScroll: true }); });
    }
    choose(select.value);
  }

  // maps of calls
  const kernels = JSON.parse(one("kernels").textContent), sources = JSON.parse(one("sources").textContent);
  for (const map of all(".map")) {
    const cells = all("i", map), readout = map.parentElement.querySelector(".readout");
    let now = -1;
    const pickCell = (number) => {
      if (now >= 0) { cells[now].classList.remove("sel"); cells[now].removeAttribute("aria-selected"); }
      now = Math.max(0, Math.min(cells.length - 1, number));
      const cell = cells[now];
      cell.classList.add("sel");
      cell.setAttribute("aria-selected", "true");
      map.setAttribute("aria-activedescendant", cell.id);
      const lane = /\bl(\d)\b/.exec(cell.className);
      const pairs = [["call", String(now)], ["in", cell.closest(".lane").querySelector(".sc").textContent], ["lane", lane ? lane[1] : "0"], ...kernels[cell.dataset.k]];
      pairs.push(...sources[cell.dataset.s].filter((pair) => pair[1]));
      if (cell.dataset.w) pairs.push(["waits for call", cell.dataset.w]);
      if (cell.dataset.b) pairs.push(["segment breaks here", cell.dataset.b]);
      listed(pairs, cell.dataset.k, readout);
    };
    map.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { event.preventDefault(); pickCell(now + step); return; }
      const row = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!row) return;
      event.preventDefault();
      const lanes = all(".lane", map), place = now < 0 ? -1 : lanes.indexOf(cells[now].closest(".lane"));
      const target = lanes[Math.max(0, Math.min(lanes.length - 1, place + row))];
      const column = now < 0 ? 0 : all("i", lanes[place]).indexOf(cells[now]);
      const held = all("i", target);
      pickCell(cells.indexOf(held[Math.min(column, held.length - 1)]));
    });
    for (const kind of ["click", "mouseover"]) {
      map.addEventListener(kind, (event) => { if (event.target.matches("i")) pickCell(cells.indexOf(event.target)); });
    }
  }

  // memory at a chosen load
  const data = JSON.parse(one("memory-data").textContent);
  const bytes = (n) => n < 1e3 ? `${n} bytes` : n < 1e6 ? `${(n / 1e3).toFixed(1)} KB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB`
    : `${(n / 1e9).toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })} GB`;
  const SVG = one("mem-all").namespaceURI;
  function part(svg, name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text) made.textContent = text;
    svg.append(made);
    return made;
  }
  function bar(svg, parts, scale, limits) {
    svg.replaceChildren();
    let left = 0;
    for (const [name, size, cls] of parts) {
      const share = 100 * size / scale;
      const rect = part(svg, "rect", { x: `${left}%`, y: 0, width: `${share}%`, height: 22, class: cls, style: "fill:var(--f)" });
      const label = `${name} ${bytes(size)}`;
      part(rect, "title", {}, label);
      if (share * svg.clientWidth / 100 > 6.2 * label.length) part(svg, "text", { x: `${left + 0.3}%`, y: 36 }, label);
      left += share;
    }
    for (const [name, size] of limits) {
      const x = `${Math.min(100, 100 * size / scale)}%`;
      part(svg, "line", { x1: x, x2: x, y1: -3, y2: 26 });
      part(svg, "text", { x, y: 50, "text-anchor": size > scale / 2 ? "end" : "start" }, `${name} ${bytes(size)}`);
    }
  }
  let shown = data.chosen;
  function load(i, j) {
    shown = [i, j];
    const chosen = data.loads[i][j], pools = chosen.pools.reduce((a, b) => a + b, 0);
    const fixed = data.fixed.reduce((sum, item) => sum + item[1], 0), sum = fixed + pools;
    const parts = [...data.fixed.map(([name, size], n) => [name, size, `m${n}`]), ...data.pools.map((name, n) => [name, chosen.pools[n], `p${n}`])];
    bar(one("mem-all"), parts, Math.max(sum, data.total), [["available", data.limit]]);
    const rest = parts.filter((item) => item[0] !== "weights");
    bar(one("mem-rest"), rest, rest.reduce((total, item) => total + item[1], 0), []);
    const left = data.limit - sum;
    one("load").textContent = `${chosen.requests.toLocaleString("en")} ${chosen.requests === 1 ? "request" : "requests"} of ${chosen.context.toLocaleString("en")} tokens: ${bytes(sum)} in all, `
      + (chosen.fits ? `${bytes(Math.max(0, left))} stay free.` : left < 0 ? `${bytes(-left)} more than are available.` : "more than pools may take.");
    all("#mem-table .pool .num").forEach((cell, n) => { cell.textContent = bytes(chosen.pools[n]); });
    one("mem-table").querySelector(".sum .num").textContent = bytes(sum);
    all(".load").forEach((button) => button.setAttribute("aria-pressed", button.dataset.load === `${i},${j}`));
  }
  const table = document.querySelector(".loads");
  table.addEventListener("click", (event) => {
    const button = event.target.closest(".load");
    if (button) load(...button.dataset.load.split(",").map(Number));
  });
  table.addEventListener("keydown", (event) => {
    const button = event.target.closest(".load");
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!button || !step) return;
    const [i, j] = button.dataset.load.split(",").map(Number);
    const target = table.querySelector(`[data-load="${i + step[0]},${j + step[1]}"]`);
    if (!target) return;
    event.preventDefault();
    target.focus();
  });
  load(...shown);
  addEventListener("resize", () => load(...shown));

  reveal();
})();
