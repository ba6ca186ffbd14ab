// Draws the page's figures in the colours of the current theme, and again when the theme changes or the page is printed.
// plotly.js comes deflated, a third of its size; the page's policy knows its hash.
// With a figure in focus, the arrow keys go from point to point and tell what hovering would show; Escape ends it.
(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("screen and (max-width: 46rem)");
  const root = document.documentElement;
  const told = document.getElementById("told");
  const MAX_NARROW_LABEL = 10;
  const MS_OF_A_HOVER = 80; // plotly.js draws a label at most every 50 ms

  // A colour in a specification is the name of a CSS variable, "var(--name)"; everything else is left as it is.
  const paint = (value, style) => {
    if (typeof value === "string") {
      const name = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => paint(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, paint(item, style)]));
    }
    return value;
  };

  // Names of rows and columns would leave a phone no room for what they name. An entity counts as one character.
  const shorten = (layout) => {
    for (const axis of [layout.xaxis, layout.yaxis]) {
      if (!axis || !axis.ticktext) continue;
      axis.ticktext = axis.ticktext.map((text) => {
        const signs = text.match(/&[a-z0-9#]+;|[^]/giu) || [];
        if (signs.length <= MAX_NARROW_LABEL) return text;
        // Names that begin alike differ at their ends.
        const tail = Math.floor((MAX_NARROW_LABEL - 1) / 2);
        return `${signs.slice(0, MAX_NARROW_LABEL - 1 - tail).join("")}\u2026${signs.slice(-tail).join("")}`;
      });
    }
  };

  const draw = () => {
    const style = getComputedStyle(root);
    const isPrinting = root.classList.contains("printing");
    for (const [name, spec] of Object.entries(specs)) {
      const canvas = document.getElementById(`figure-${name}`);
      const { data, layout } = paint(spec, style);
      // Paper does not wait: plotly.js measures a new width by itself only after a while.
      if (isPrinting) Object.assign(layout, { width: canvas.clientWidth, height: canvas.clientHeight });
      layout.font.family = getComputedStyle(document.body).fontFamily;
      if (narrow.matches) shorten(layout);
      Plotly.react(canvas, data, layout, { displayModeBar: false, responsive: true });
    }
  };

  // Every point that hovering tells something of: of a map its cells, row by row, of lines and marks their points.
  const listStops = (canvas) =>
    canvas._fullData.flatMap((trace, curveNumber) => {
      if (trace.hoverinfo === "skip") return [];
      const subplot = `${trace.xaxis || "x"}${trace.yaxis || "y"}`;
      if (trace.type === "heatmap") {
        const { z } = canvas.calcdata[curveNumber][0];
        return z.flatMap((row, y) =>
          [...row].map((value, x) => ({ subplot, at: { xval: x, yval: y }, isBlank: !Number.isFinite(value) })),
        );
      }
      return [...trace.x].map((x, pointNumber) => ({ subplot, at: [{ curveNumber, pointNumber }], isBlank: x === null }));
    });

  const countColumns = (canvas) => {
    const map = canvas.calcdata.find((calc) => calc[0].trace.type === "heatmap");
    return map ? map[0].z[0].length : 1;
  };

  const tell = (canvas) => {
    const label = canvas.querySelector(".hoverlayer .hovertext");
    const lines = label ? [...label.querySelectorAll("tspan.line")] : [];
    told.textContent = lines.length ? lines.map((line) => line.textContent).join(", ") : label?.textContent || "";
  };

  const step = (canvas, key) => {
    const points = (canvas.stops ??= listStops(canvas));
    if (points.every((point) => point.isBlank)) return;
    const n = countColumns(canvas);
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: n, ArrowUp: -n }[key];
    let at = canvas.stop ?? (move > 0 ? -move : 0);
    for (let tries = 0; tries < points.length; tries++) {
      at = (at + move + points.length) % points.length;
      if (!points[at].isBlank) break;
    }
    canvas.stop = at;
    Plotly.Fx.hover(canvas, points[at].at, points[at].subplot);
    setTimeout(() => tell(canvas), MS_OF_A_HOVER);
  };

  const listen = () => {
    for (const canvas of document.querySelectorAll(".canvas")) {
      canvas.addEventListener("keydown", (event) => {
        if (event.key === "Escape") Plotly.Fx.unhover(canvas);
        if (!event.key.startsWith("Arrow") || event.altKey || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        step(canvas, event.key);
      });
      canvas.addEventListener("blur", () => {
        canvas.stop = undefined;
        Plotly.Fx.unhover(canvas);
      });
    }
  };

  const unpack = async () => {
    const packed = document.getElementById("plotly");
    const bytes = Uint8Array.from(atob(packed.textContent), (sign) => sign.charCodeAt(0));
    const source = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const script = document.createElement("script");
    script.textContent = await new Response(source).text();
    document.head.append(script);
    packed.remove();
  };

  const follow = () => {
    dark.addEventListener("change", draw);
    narrow.addEventListener("change", draw);
    // Paper can't be unfolded: it has the config, but not tables that are wider than it.
    const unfolded = [];
    addEventListener("beforeprint", () => {
      root.classList.add("printing");
      unfolded.push(...document.querySelectorAll("details:not([open]):has(> pre)"));
      for (const fold of unfolded) fold.open = true;
      draw();
    });
    addEventListener("afterprint", () => {
      root.classList.remove("printing");
      for (const fold of unfolded.splice(0)) fold.open = false;
      draw();
      document.querySelectorAll(".canvas").forEach((canvas) => Plotly.Plots.resize(canvas));
    });
  };

  // What a picture shows is also in words, and its numbers mostly in tables.
  const tellInstead = () => {
    for (const canvas of document.querySelectorAll(".canvas")) {
      const told = canvas.getAttribute("aria-label");
      canvas.className = "unfigured";
      canvas.textContent = `This browser can't unpack the picture (it has no DecompressionStream). ${told}`;
      canvas.removeAttribute("style");
    }
    root.dataset.drawn = "false";
  };

  const start = () => {
    draw();
    listen();
    follow();
    root.dataset.drawn = "true";
  };

  "DecompressionStream" in globalThis ? unpack().then(start) : tellInstead();
})();
