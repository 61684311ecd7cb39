"use strict";
(() => {
  const tip = document.getElementById("tip");
  const pairs = text => text.split(" ").map(pair => pair.split(",").map(Number));
  const number = v => Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(5)));

  function scale([low, high, logLow, start, end], log) {
    if (!log) return v => start + (v - low) / (high - low) * (end - start);
    const a = Math.log(logLow), b = Math.log(high);
    return v => start + (Math.log(Math.max(v, logLow)) - a) / (b - a) * (end - start);
  }

  function chart(figure) {
    const svg = figure.querySelector("svg");
    const axes = { x: JSON.parse(figure.dataset.x), y: JSON.parse(figure.dataset.y) };
    const log = { x: false, y: false };
    const place = () => ({ x: scale(axes.x, log.x), y: scale(axes.y, log.y) });

    function redraw() {
      const { x, y } = place();
      for (const path of svg.querySelectorAll("[data-points]")) {
        const d = pairs(path.dataset.points).map(([a, b]) => x(a).toFixed(1) + " " + y(b).toFixed(1)).join("L");
        path.setAttribute("d", "M" + d + (path.classList.contains("band") ? "Z" : ""));
      }
      for (const dot of svg.querySelectorAll("[data-at]")) {
        const [a, b] = dot.dataset.at.split(",").map(Number);
        dot.setAttribute("cx", x(a).toFixed(1));
        dot.setAttribute("cy", y(b).toFixed(1));
      }
      for (const name of ["x", "y"]) {
        svg.querySelector(`.tick.${name}.linear`).setAttribute("display", log[name] ? "none" : "inline");
        svg.querySelector(`.tick.${name}.log`)?.setAttribute("display", log[name] ? "inline" : "none");
      }
    }

    const tools = document.createElement("span");
    for (const name of ["x", "y"]) {
      if (axes[name][2] === null) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "log " + name;
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        log[name] = !log[name];
        button.setAttribute("aria-pressed", String(log[name]));
        redraw();
      });
      tools.append(button);
    }
    figure.querySelector("figcaption").append(tools);

    const rule = document.createElementNS("http://www.w3.org/2000/svg", "line");
    rule.setAttribute("class", "rule");
    rule.setAttribute("y1", String(axes.y[3]));
    rule.setAttribute("y2", String(axes.y[4]));
    rule.setAttribute("display", "none");
    svg.append(rule);
    for (const title of svg.querySelectorAll("title")) title.remove(); // the box below takes their place

    const shown = element => getComputedStyle(element.closest("[data-arm]")).display !== "none";
    const styleOf = element => element.closest("[data-arm]").getAttribute("class").split(" ").find(c => /^c\d$/.test(c));

    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const at = [(event.clientX - box.left) / box.width * svg.viewBox.baseVal.width,
        (event.clientY - box.top) / box.height * svg.viewBox.baseVal.height];
      const { x, y } = place();
      const rows = [];
      for (const path of svg.querySelectorAll("path.line[data-name]")) {
        if (!shown(path)) continue;
        const points = pairs(path.dataset.points);
        const best = points.reduce((a, b) => Math.abs(x(b[0]) - at[0]) < Math.abs(x(a[0]) - at[0]) ? b : a);
        rows.push({ name: path.dataset.name, style: styleOf(path), x: best[0], y: best[1],
          far: Math.abs(x(best[0]) - at[0]) });
      }
      if (rows.length) {
        const closest = Math.min(...rows.map(row => row.far));
        return { rows: rows.filter(row => row.far < closest + 12), rule: x(rows.find(row => row.far === closest).x) };
      }
      for (const dot of svg.querySelectorAll("circle.dot")) {
        if (!shown(dot)) continue;
        const [a, b] = dot.dataset.at.split(",").map(Number);
        rows.push({ name: dot.dataset.name, style: styleOf(dot), x: a, y: b, far: Math.hypot(x(a) - at[0], y(b) - at[1]) });
      }
      rows.sort((a, b) => a.far - b.far);
      return { rows: rows.filter(row => row.far < 24).slice(0, 1), rule: null };
    }

    function show(event) {
      const found = nearest(event);
      tip.hidden = !found.rows.length;
      rule.setAttribute("display", found.rule === null || tip.hidden ? "none" : "inline");
      if (tip.hidden) return;
      if (found.rule !== null) {
        rule.setAttribute("x1", String(found.rule));
        rule.setAttribute("x2", String(found.rule));
      }
      tip.replaceChildren(...found.rows.sort((a, b) => a.y - b.y).map(row => {
        const line = document.createElement("div");
        const mark = document.createElement("i");
        const name = document.createElement("span");
        const value = document.createElement("b");
        line.className = row.style;
        name.textContent = row.name;
        value.textContent = number(row.y);
        line.append(mark, name, value);
        return line;
      }));
      const head = document.createElement("div");
      head.textContent = number(found.rows[0].x) + " " + [...svg.querySelectorAll("text.label")][0].textContent;
      tip.prepend(head);
      const { width, height } = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4)) + "px";
      tip.style.top = Math.max(4, event.clientY - height - 14) + "px";
    }

    function hide() {
      tip.hidden = true;
      rule.setAttribute("display", "none");
    }

    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
    addEventListener("scroll", hide, { passive: true });
  }

  document.querySelectorAll("figure.chart[data-x]").forEach(chart);
})();
