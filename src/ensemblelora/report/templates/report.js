// Draws the page's figures in the colours of the current theme, and again when the theme changes or the page is printed.
(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

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

  const draw = () => {
    const style = getComputedStyle(root);
    for (const [name, spec] of Object.entries(specs)) {
      const { data, layout } = paint(spec, style);
      layout.font.family = getComputedStyle(document.body).fontFamily;
      Plotly.react(document.getElementById(`figure-${name}`), data, layout, { displayModeBar: false, responsive: true });
    }
  };

  draw();
  dark.addEventListener("change", draw);
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    draw();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    draw();
  });
})();
