// Cells as discs, rings and diamonds, drawn with WebGL 2.

import * as twgl from "twgl.js";

/** What a cell looks like: greyed out, answered, answered less deep than is shown, novel. */
export const SHAPES = { grey: 0, disc: 1, ring: 2, diamond: 3 };

const VERTEX = `#version 300 es
in vec2 position; in vec4 colour;
uniform vec2 scale; uniform vec2 shift; uniform float size;
flat out vec3 tint; flat out int shape;
void main() {
  shape = int(colour.a * 255.0 + 0.5);
  tint = colour.rgb;
  gl_Position = vec4(position * scale + shift, 0.0, 1.0);
  gl_PointSize = size * (shape == ${SHAPES.grey} ? 0.8 : shape == ${SHAPES.diamond} ? 1.6 : 1.0);
}`;
const FRAGMENT = `#version 300 es
precision highp float;
flat in vec3 tint; flat in int shape; uniform float size; uniform bool outlined; out vec4 result;
void main() {
  vec2 offset = abs(gl_PointCoord - 0.5) * 2.0;
  float distance = shape == ${SHAPES.diamond} ? offset.x + offset.y : length(offset);
  float alpha = (shape == ${SHAPES.grey} ? 0.1 : 0.88) * clamp((1.0 - distance) * size / 2.0, 0.0, 1.0);
  if (shape == ${SHAPES.ring} && distance < 0.55) alpha *= 0.1;
  vec3 shown = outlined && distance > 0.62 ? vec3(distance > 0.8 ? 0.0 : 1.0) : tint;
  result = vec4(shown * alpha, alpha);
}`;

export class Points {
  private readonly gl: WebGL2RenderingContext;
  private readonly program: twgl.ProgramInfo;
  private readonly layers: twgl.BufferInfo[] = []; // later ones lie above

  constructor(readonly canvas: HTMLCanvasElement) {
    const gl = canvas.getContext("webgl2", { antialias: false, premultipliedAlpha: true });
    if (!gl) throw new Error("the map needs WebGL 2, which this browser lacks");
    this.gl = gl;
    this.program = twgl.createProgramInfo(gl, [VERTEX, FRAGMENT]);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }

  /** Add a layer, with positions (n, 2) and colours (n, 4): red, green, blue, and one of SHAPES. */
  add(positions: Float32Array, colours: Uint8Array): void {
    const colour = { numComponents: 4, data: colours, normalize: true };
    this.layers.push(twgl.createBufferInfoFromArrays(this.gl, { position: { numComponents: 2, data: positions }, colour }));
  }

  update(layer: number, name: "position" | "colour", values: Float32Array | Uint8Array): void {
    twgl.setAttribInfoBufferFromArray(this.gl, this.layers[layer].attribs![name], values);
  }

  removeFrom(layer: number): void {
    for (const { attribs } of this.layers.splice(layer)) {
      for (const { buffer } of Object.values(attribs!)) this.gl.deleteBuffer(buffer);
    }
  }

  /** origin: pixel of the map's (0, 0); scale: pixels per unit of it; sizes: pixels across a disc, per layer. */
  draw(origin: [number, number], scale: number, sizes: number[], ratio: number): void {
    const { gl, canvas, program } = this;
    const [width, height] = [canvas.width / ratio, canvas.height / ratio];
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.useProgram(program.program);
    this.layers.forEach((layer, i) => {
      twgl.setBuffersAndAttributes(gl, program, layer);
      twgl.setUniforms(program, {
        scale: [(2 * scale) / width, (2 * scale) / height],
        shift: [(2 * origin[0]) / width - 1, 1 - (2 * origin[1]) / height],
        size: sizes[i] * ratio,
        outlined: i > 0,
      });
      twgl.drawBufferInfo(gl, layer, gl.POINTS);
    });
  }
}
