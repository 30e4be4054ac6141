// The map: cells, camera, the names of the islands, the lines to neighbours, and the lasso.

import { select } from "d3-selection";
import { zoom, zoomIdentity, type ZoomBehavior, type ZoomTransform } from "d3-zoom";
import type { Island } from "./islands";
import { type Camera, Points } from "./points";

export type Hit = { layer: number; row: number };
export interface Link {
  from: Hit;
  to: Hit;
  colour: string;
  dashed: boolean;
}

interface Events {
  click(hit: Hit | null): void;
  hover(hit: Hit | null, x: number, y: number): void;
  lasso(corners: number[]): void;
  moved(): void; // camera, or prefix, came to rest
}

const FIT = 0.92; // share of the free space that the map takes
const CORNERS = 150; // of a lasso, at most
const MORPH = 800; // milliseconds between two prefixes

export class MapView {
  prefix = 1;
  lassoing = false;
  lasso: number[] | null = null; // corners on the map, x and y in turn
  lassoAt = 1; // the prefix at which it was drawn: at another one the cells lie elsewhere
  links: Link[] = [];
  chosen: Hit | null = null;
  names: (prefix: number) => Island[] = () => [];
  nameOf: (node: number) => string = String;
  lit: (hit: Hit) => boolean = () => true;
  private readonly points: Points;
  private readonly layouts: Float32Array[][] = [];
  private readonly zooming: ZoomBehavior<HTMLCanvasElement, unknown>;
  private transform: ZoomTransform = zoomIdentity;
  private width = 1;
  private height = 1;
  private planned = 0;
  private moving = 0;
  private stopZoom: (() => void) | null = null;

  constructor(
    private readonly canvas: HTMLCanvasElement,
    private readonly overlay: HTMLCanvasElement,
    private readonly covered: () => number, // pixels below the map that other things cover
    private readonly events: Events,
  ) {
    this.points = new Points(canvas);
    this.zooming = zoom<HTMLCanvasElement, unknown>()
      .scaleExtent([0.5, 60])
      .filter((event: MouseEvent) => !this.lassoing && !event.shiftKey && (!event.ctrlKey || event.type === "wheel") && !event.button)
      .on("start", ({ sourceEvent }: { sourceEvent: unknown }) => {
        if (sourceEvent) this.stopZoom?.(); // the person takes over
      })
      .on("zoom", ({ transform }: { transform: ZoomTransform }) => {
        this.transform = transform;
        this.draw();
      })
      .on("end", () => events.moved());
    select(canvas).call(this.zooming);
    canvas.addEventListener("click", (event) => {
      if (!this.lassoing && !event.shiftKey) events.click(this.pick(event.offsetX, event.offsetY));
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons || event.pointerType === "touch") return;
      events.hover(this.pick(event.offsetX, event.offsetY), event.offsetX, event.offsetY);
    });
    canvas.addEventListener("pointerleave", () => events.hover(null, 0, 0));
    canvas.addEventListener("pointerdown", (event) => {
      if ((this.lassoing || event.shiftKey) && event.button === 0) this.drawLasso(event);
    });
    new ResizeObserver(() => this.resize()).observe(canvas);
    this.resize();
  }

  add(layouts: Float32Array[], colours: Uint8Array): number {
    this.layouts.push(layouts);
    const layer = this.points.add(layouts);
    this.setColours(layer, colours);
    return layer;
  }

  removeFrom(layer: number): void {
    this.points.removeFrom(layer);
    this.layouts.splice(layer);
    this.draw();
  }

  setColours(layer: number, colours: Uint8Array): void {
    this.points.setColours(layer, colours);
    this.draw();
  }

  draw(): void {
    this.planned ||= requestAnimationFrame(() => {
      this.planned = 0;
      this.drawNow();
    });
  }

  drawNow(): void {
    this.points.draw(this.prefix, this.camera(), this.layouts.map((_, i) => this.size() * (i ? 1.5 : 1) + (i ? 3 : 0)), this.ratio);
    this.drawOverlay(this.overlay.getContext("2d")!, this.ratio);
  }

  /** The map as it is seen, in pixels of the screen times `ratio`. */
  picture(): HTMLCanvasElement {
    this.drawNow();
    const made = document.createElement("canvas");
    [made.width, made.height] = [this.canvas.width, this.canvas.height];
    const context = made.getContext("2d")!;
    context.fillStyle = this.style("--ground");
    context.fillRect(0, 0, made.width, made.height);
    context.drawImage(this.canvas, 0, 0);
    context.drawImage(this.overlay, 0, 0);
    return made;
  }

  /** Set the prefix at once, or move there in MORPH milliseconds. */
  morph(to: number, smooth: boolean, step: (prefix: number) => void): void {
    cancelAnimationFrame(this.moving);
    const from = this.prefix;
    const began = performance.now();
    const arrive = (prefix: number) => {
      this.prefix = prefix;
      step(prefix);
      this.draw();
    };
    if (!smooth || from === to || matchMedia("(prefers-reduced-motion: reduce)").matches) {
      arrive(to);
      this.events.moved();
      return;
    }
    const frame = (now: number) => {
      const share = Math.min(1, Math.max(0, now - began) / MORPH);
      arrive(share === 1 ? to : from + (to - from) * (share * share * (3 - 2 * share)));
      if (share < 1) this.moving = requestAnimationFrame(frame);
      else this.events.moved();
    };
    this.moving = requestAnimationFrame(frame);
  }

  get view(): [number, number, number] {
    const { k } = this.transform;
    const [x, y] = this.toMap(this.width / 2, (this.height - this.bottom) / 2);
    return [k, x, y];
  }

  /** Zoom so that the place (x, y) of the map is in the middle. */
  look([k, x, y]: [number, number, number], smooth = false): void {
    this.stopZoom?.();
    const base = this.base();
    const next = zoomIdentity
      .translate(this.width / 2, (this.height - this.bottom) / 2)
      .scale(Math.min(60, Math.max(0.5, k)))
      .translate(-(base.x + base.scale * x), -(base.y - base.scale * y));
    if (smooth) select(this.canvas).call((target) => this.animate(target, next));
    else select(this.canvas).call(this.zooming.transform, next);
  }

  zoomBy(factor: number): void {
    const [k, x, y] = this.view;
    this.look([k * factor, x, y], true);
  }

  /** Look at these cells of layer 0. */
  frame(rows: number[]): void {
    if (!rows.length) return;
    const at = rows.map((row) => this.position({ layer: 0, row }));
    const middle = (axis: 0 | 1, q: number) => at.map((p) => p[axis]).sort((a, b) => a - b)[Math.floor(q * (at.length - 1))];
    const [left, right, low, high] = [middle(0, 0.05), middle(0, 0.95), middle(1, 0.05), middle(1, 0.95)];
    const k = Math.min(8, Math.max(1, 1.1 / Math.max(right - left, high - low, 0.05)));
    this.look(k <= 1.2 ? [1, 0, 0] : [k, (left + right) / 2, (low + high) / 2], true);
  }

  reset(): void {
    this.look([1, 0, 0], true);
  }

  private animate(target: unknown, next: ZoomTransform): void {
    const from = this.transform;
    const began = performance.now();
    let going = true;
    this.stopZoom = () => (going = false);
    const frame = (now: number) => {
      if (!going) return;
      const share = Math.min(1, Math.max(0, now - began) / 300);
      const mix = (a: number, b: number) => a + (b - a) * share * (2 - share);
      const step = zoomIdentity.translate(mix(from.x, next.x), mix(from.y, next.y)).scale(mix(from.k, next.k));
      (target as ReturnType<typeof select<HTMLCanvasElement, unknown>>).call(this.zooming.transform, share < 1 ? step : next);
      if (share < 1) requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  /** Where a cell is on the map, at this prefix. */
  position({ layer, row }: Hit): [number, number] {
    const [from, to, mixed] = this.between(layer);
    const at = (axis: number) => from[2 * row + axis] + (to[2 * row + axis] - from[2 * row + axis]) * mixed;
    return [at(0), at(1)];
  }

  /** Rows of a layer inside the corners. */
  inside(layer: number, corners: number[]): number[] {
    const rows: number[] = [];
    const [from, to, mixed] = this.between(layer);
    for (let row = 0; row < from.length / 2; row++) {
      const x = from[2 * row] + (to[2 * row] - from[2 * row]) * mixed;
      const y = from[2 * row + 1] + (to[2 * row + 1] - from[2 * row + 1]) * mixed;
      let odd = false; // a ray from the cell to the right crosses the border an odd number of times
      for (let i = 0, j = corners.length - 2; i < corners.length; j = i, i += 2) {
        const [xi, yi, xj, yj] = [corners[i], corners[i + 1], corners[j], corners[j + 1]];
        if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) odd = !odd;
      }
      if (odd) rows.push(row);
    }
    return rows;
  }

  toScreen(x: number, y: number): [number, number] {
    const camera = this.camera();
    return [camera.x + camera.scale * x, camera.y - camera.scale * y];
  }

  private toMap(x: number, y: number): [number, number] {
    const camera = this.camera();
    return [(x - camera.x) / camera.scale, (camera.y - y) / camera.scale];
  }

  private between(layer: number): [Float32Array, Float32Array, number] {
    const layouts = this.layouts[layer];
    const from = Math.min(Math.floor(this.prefix), layouts.length) - 1;
    const to = Math.min(from + 1, layouts.length - 1);
    return [layouts[from], layouts[to], this.prefix - Math.floor(this.prefix)];
  }

  private get bottom(): number {
    return this.covered();
  }

  private get ratio(): number {
    return Math.min(devicePixelRatio, 2);
  }

  private base(): Camera {
    const free = this.height - this.bottom;
    return { scale: (Math.min(this.width, free) / 2) * FIT, x: this.width / 2, y: free / 2 };
  }

  private camera(): Camera {
    const base = this.base();
    const { k, x, y } = this.transform;
    return { scale: base.scale * k, x: base.x * k + x, y: base.y * k + y };
  }

  /** Pixels across a cell: less where there are more, and more where one looks closer. */
  private size(): number {
    const n = Math.max(1, (this.layouts[0]?.[0].length ?? 2) / 2);
    const free = Math.min(this.width, this.height - this.bottom);
    return Math.min(16, Math.max(2.2, (0.8 * free) / Math.sqrt(n)) * this.transform.k ** 0.45);
  }

  private resize(): void {
    const { clientWidth, clientHeight } = this.canvas;
    if (!clientWidth || !clientHeight) return;
    [this.width, this.height] = [clientWidth, clientHeight];
    for (const canvas of [this.canvas, this.overlay]) {
      canvas.width = Math.round(clientWidth * this.ratio);
      canvas.height = Math.round(clientHeight * this.ratio);
    }
    this.drawNow();
  }

  /** The nearest lit cell within reach of a pixel; cells of later layers, which lie above, come first. */
  private pick(x: number, y: number): Hit | null {
    const [mapX, mapY] = this.toMap(x, y);
    for (let layer = this.layouts.length - 1; layer >= 0; layer--) {
      const [from, to, mixed] = this.between(layer);
      let best: Hit | null = null;
      let least = ((this.size() / 2 + (layer ? 5 : 3)) / this.camera().scale) ** 2;
      for (let row = 0; row < from.length / 2; row++) {
        const dx = from[2 * row] + (to[2 * row] - from[2 * row]) * mixed - mapX;
        const dy = from[2 * row + 1] + (to[2 * row + 1] - from[2 * row + 1]) * mixed - mapY;
        const square = dx * dx + dy * dy;
        if (square < least && this.lit({ layer, row })) {
          least = square;
          best = { layer, row };
        }
      }
      if (best) return best;
    }
    return null;
  }

  private drawLasso(event: PointerEvent): void {
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    const corner = (x: number, y: number) => this.toMap(x, y).map((value) => Math.round(1000 * value) / 1000);
    const corners = corner(event.offsetX, event.offsetY);
    this.setLasso(corners);
    let [lastX, lastY] = [event.offsetX, event.offsetY];
    const move = (next: PointerEvent) => {
      if (Math.hypot(next.offsetX - lastX, next.offsetY - lastY) < 4) return;
      [lastX, lastY] = [next.offsetX, next.offsetY];
      corners.push(...corner(lastX, lastY));
      this.draw();
    };
    const end = () => {
      this.canvas.removeEventListener("pointermove", move);
      const step = Math.ceil(corners.length / 2 / CORNERS);
      const kept = corners.filter((_, i) => (i >> 1) % step === 0);
      if (kept.length >= 6) this.events.lasso(kept);
      else this.setLasso(null);
    };
    this.canvas.addEventListener("pointermove", move);
    this.canvas.addEventListener("pointerup", end, { once: true });
  }

  setLasso(corners: number[] | null): void {
    this.lasso = corners;
    this.lassoAt = Number(this.prefix.toFixed(2));
    this.draw();
  }

  private style(name: string): string {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  private drawOverlay(context: CanvasRenderingContext2D, ratio: number): void {
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    const [ink, ground] = [this.style("--ink"), this.style("--ground")];
    const at = (hit: Hit) => this.toScreen(...this.position(hit));
    const visible = this.links.filter(({ from, to }) => this.layouts[from.layer] && this.layouts[to.layer]);
    for (const { from, to, colour, dashed } of visible) {
      context.beginPath();
      context.moveTo(...at(from));
      context.lineTo(...at(to));
      context.setLineDash(dashed ? [3, 3] : []);
      context.lineWidth = dashed ? 0.8 : 1.2;
      context.strokeStyle = colour;
      context.stroke();
      context.setLineDash([]);
      context.beginPath();
      context.arc(...at(to), dashed ? 2.5 : 3, 0, 7);
      context.stroke();
    }
    if (this.chosen && this.layouts[this.chosen.layer]) {
      for (const [width, colour] of [[5, ground], [2.5, ink]] as const) {
        context.beginPath();
        context.arc(...at(this.chosen), 8, 0, 7);
        context.lineWidth = width;
        context.strokeStyle = colour;
        context.stroke();
      }
    }
    if (this.lasso && Math.abs(this.prefix - this.lassoAt) < 0.01) {
      context.beginPath();
      for (let i = 0; i < this.lasso.length; i += 2) context.lineTo(...this.toScreen(this.lasso[i], this.lasso[i + 1]));
      context.closePath();
      context.lineWidth = 1.5;
      context.strokeStyle = ink;
      context.setLineDash([5, 4]);
      context.stroke();
      context.setLineDash([]);
    }
    this.drawNames(context, ink, ground);
  }

  /** Names of the islands, the largest first; one that would cover another is left out. */
  private drawNames(context: CanvasRenderingContext2D, ink: string, ground: string): void {
    const nearest = Math.round(this.prefix);
    const alpha = 1 - Math.abs(this.prefix - nearest) * 5;
    if (alpha <= 0) return;
    context.globalAlpha = alpha;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineJoin = "round";
    const taken: [number, number, number, number][] = [];
    const small = Math.min(this.width, this.height) < 480;
    const size = small ? 11 : 13;
    context.font = `600 ${size}px system-ui, sans-serif`;
    for (const { node, x, y, radius } of this.names(nearest)) {
      const [screenX, middle] = this.toScreen(x, y);
      const lines = wrap(this.nameOf(node), small ? 16 : 22);
      const reach = radius * this.camera().scale;
      const screenY = reach > 24 ? middle : middle - reach * 1.5 - 6 - (lines.length * size) / 2; // a name would hide it
      const width = Math.max(...lines.map((line) => context.measureText(line).width)) + 6;
      const height = lines.length * (size + 2) + 2;
      const box: [number, number, number, number] = [screenX - width / 2, screenY - height / 2, screenX + width / 2, screenY + height / 2];
      const hidden = box[2] < 0 || box[0] > this.width || box[3] < 0 || box[1] > this.height - this.bottom;
      if (hidden || taken.some((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3])) continue;
      taken.push(box);
      lines.forEach((line, i) => {
        const lineY = screenY + (i - (lines.length - 1) / 2) * (size + 2);
        context.lineWidth = 4;
        context.strokeStyle = ground;
        context.strokeText(line, screenX, lineY);
        context.fillStyle = ink;
        context.fillText(line, screenX, lineY);
      });
    }
    context.globalAlpha = 1;
  }
}

/** At most two lines; what is longer ends with dots. */
function wrap(name: string, width: number): string[] {
  if (name.length <= width) return [name];
  const words = name.split(" ");
  const lines = [""];
  for (const word of words) {
    const last = lines.length - 1;
    if ((lines[last] + word).length <= width || !lines[last]) lines[last] += `${lines[last] && " "}${word}`;
    else lines.push(word);
  }
  const shown = lines.slice(0, 2).map((line) => (line.length > width + 6 ? `${line.slice(0, width + 5)}…` : line));
  if (lines.length > 2) shown[1] = `${shown[1].slice(0, width - 1)}…`;
  return shown;
}
