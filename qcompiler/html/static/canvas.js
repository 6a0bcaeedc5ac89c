// The viewport of the drawing: scroll to move, pinch or Ctrl-scroll to zoom, drag to move.

const LEAST_READABLE = 0.8;
/** Zoom below which text is too small to read, so fewer details are shown. */

class Canvas {
  constructor(svg) {
    this.svg = svg;
    this.scene = shape("g", { class: "scene" });
    svg.append(this.scene);
    Object.assign(this, { x: 0, y: 0, zoom: 1, extent: { width: 1, height: 1 } });
    svg.addEventListener("wheel", (event) => this.scrolled(event), { passive: false });
    svg.addEventListener("pointerdown", (event) => this.dragged(event));
  }

  get window() {
    return this.svg.getBoundingClientRect();
  }

  apply() {
    this.scene.setAttribute("transform", `translate(${this.x} ${this.y}) scale(${this.zoom})`);
  }

  scrolled(event) {
    event.preventDefault();
    const { left, top } = this.window;
    if (event.ctrlKey || event.metaKey) this.zoomBy(Math.exp(-event.deltaY / 300), event.clientX - left, event.clientY - top);
    else {
      this.x -= event.shiftKey ? event.deltaY : event.deltaX;
      this.y -= event.shiftKey ? 0 : event.deltaY;
      this.apply();
    }
  }

  dragged(event) {
    if (event.button !== 0) return;
    const start = { x: this.x - event.clientX, y: this.y - event.clientY };
    const from = { x: event.clientX, y: event.clientY };
    const move = (next) => {
      if (!this.moving && Math.hypot(next.clientX - from.x, next.clientY - from.y) < 4) return;
      this.moving = true;
      this.x = start.x + next.clientX;
      this.y = start.y + next.clientY;
      this.apply();
    };
    const end = () => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", end);
      removeEventListener("pointercancel", end);
      setTimeout(() => (this.moving = false)); // after the click event that ends the drag
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", end);
    addEventListener("pointercancel", end);
  }

  zoomBy(factor, x = this.window.width / 2, y = this.window.height / 2) {
    const zoom = Math.min(3, Math.max(0.05, this.zoom * factor));
    this.x = x - ((x - this.x) * zoom) / this.zoom;
    this.y = y - ((y - this.y) * zoom) / this.zoom;
    this.zoom = zoom;
    this.apply();
  }

  /** Shows the whole drawing at any zoom. */
  fit() {
    const { width, height } = this.window;
    this.zoom = Math.max(0.05, Math.min(width / this.extent.width, height / this.extent.height, 1.15));
    this.x = (width - this.extent.width * this.zoom) / 2;
    this.y = (height - this.extent.height * this.zoom) / 2;
    this.apply();
  }

  /** Shows the whole drawing or, if it would be too small to read, the surroundings of a part. */
  show(part) {
    this.fit();
    if (this.zoom >= LEAST_READABLE) return;
    const { width, height } = this.window;
    this.zoom = LEAST_READABLE;
    const high = this.extent.height * this.zoom;
    this.x = width / 2 - (part.x + part.width / 2) * this.zoom;
    this.y = high <= height ? (height - high) / 2 : Math.min(0, Math.max(height - high, height / 4 - part.y * this.zoom));
    this.apply();
  }

  /** Centers a part of the drawing, unless it is already visible. */
  reveal({ x, y, width, height }, always = false) {
    const { width: w, height: h } = this.window;
    if (this.zoom < 0.5) this.zoom = 0.8;
    const [left, top] = [x * this.zoom + this.x, y * this.zoom + this.y];
    const inside = left >= 8 && top >= 8 && left + width * this.zoom <= w - 8 && top + height * this.zoom <= h - 8;
    if (always || !inside) {
      this.x = w / 2 - (x + width / 2) * this.zoom;
      this.y = h / 2 - (y + height / 2) * this.zoom;
    }
    this.apply();
  }

  /** Keeps a point of the drawing that has moved at the same place on the screen. */
  hold(from, to) {
    this.x += (from.x - to.x) * this.zoom;
    this.y += (from.y - to.y) * this.zoom;
    this.apply();
  }
}
