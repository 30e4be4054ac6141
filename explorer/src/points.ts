// Cells as discs, by WebGL 2. Two layouts lie in the graphics memory at a time; the shader mixes them.

const VERTEX = `#version 300 es
in vec2 from; in vec2 to; in vec4 colour;
uniform float mixed; uniform vec2 scale; uniform vec2 shift; uniform float size;
out vec4 tint;
void main() {
  gl_Position = vec4(mix(from, to, mixed) * scale + shift, 0.0, 1.0);
  gl_PointSize = size * (colour.a < 0.3 ? 0.8 : 1.0);
  tint = colour;
}`;
const FRAGMENT = `#version 300 es
precision highp float;
in vec4 tint; uniform float size; uniform float ring; out vec4 result;
void main() {
  float distance = length(gl_PointCoord - 0.5) * 2.0;
  float edge = 2.0 / size;
  float alpha = tint.a * (1.0 - smoothstep(1.0 - edge, 1.0, distance));
  vec3 shown = ring > 0.5 && distance > 0.62 ? vec3(distance > 0.8 ? 0.0 : 1.0) : tint.rgb;
  result = vec4(shown * alpha, alpha);
}`;

export interface Camera {
  scale: number; // pixels of the screen per unit of the map
  x: number; // pixel of the map's origin
  y: number;
}

interface Layer {
  array: WebGLVertexArrayObject;
  from: WebGLBuffer;
  to: WebGLBuffer;
  colour: WebGLBuffer;
  loaded: [number, number];
  n: number;
  layouts: Float32Array[]; // (n, 2) per prefix
}

export class Points {
  private readonly gl: WebGL2RenderingContext;
  private readonly program: WebGLProgram;
  private readonly place: (name: string) => WebGLUniformLocation | null;
  private readonly layers: Layer[] = [];

  constructor(readonly canvas: HTMLCanvasElement) {
    const gl = canvas.getContext("webgl2", { antialias: false, premultipliedAlpha: true });
    if (!gl) throw new Error("this browser draws no WebGL 2, which the map takes");
    this.gl = gl;
    this.program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]] as const) {
      const shader = gl.createShader(kind)!;
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(this.program, shader);
    }
    gl.linkProgram(this.program);
    if (!gl.getProgramParameter(this.program, gl.LINK_STATUS)) {
      throw new Error(`the map can't be drawn: ${gl.getProgramInfoLog(this.program)}`);
    }
    const program = this.program;
    this.place = (name) => gl.getUniformLocation(program, name);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }

  /** A layer of cells, above those added before: one layout (n, 2) per prefix. -> its number */
  add(layouts: Float32Array[]): number {
    const gl = this.gl;
    const layer: Layer = {
      array: gl.createVertexArray()!, from: gl.createBuffer()!, to: gl.createBuffer()!, colour: gl.createBuffer()!,
      loaded: [-1, -1], n: layouts[0].length / 2, layouts,
    };
    gl.bindVertexArray(layer.array);
    const attribute = (name: string, buffer: WebGLBuffer, size: number, type: number, normalized: boolean) => {
      const at = gl.getAttribLocation(this.program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.enableVertexAttribArray(at);
      gl.vertexAttribPointer(at, size, type, normalized, 0, 0);
    };
    attribute("from", layer.from, 2, gl.FLOAT, false);
    attribute("to", layer.to, 2, gl.FLOAT, false);
    attribute("colour", layer.colour, 4, gl.UNSIGNED_BYTE, true);
    this.layers.push(layer);
    return this.layers.length - 1;
  }

  /** Layers from this number on are forgotten. */
  removeFrom(number: number): void {
    for (const layer of this.layers.splice(number)) {
      for (const buffer of [layer.from, layer.to, layer.colour]) this.gl.deleteBuffer(buffer);
      this.gl.deleteVertexArray(layer.array);
    }
  }

  /** colours (n, 4): red, green, blue, alpha */
  setColours(number: number, colours: Uint8Array): void {
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.layers[number].colour);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, colours, this.gl.DYNAMIC_DRAW);
  }

  /** prefix: 1 to the number of prefixes, and between; sizes: of a disc in pixels, per layer */
  draw(prefix: number, camera: Camera, sizes: number[], ratio: number): void {
    const { gl, canvas } = this;
    const [width, height] = [canvas.width, canvas.height];
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.useProgram(this.program);
    const scale = camera.scale * ratio;
    gl.uniform2f(this.place("scale"), (2 * scale) / width, (2 * scale) / height);
    gl.uniform2f(this.place("shift"), (2 * camera.x * ratio) / width - 1, 1 - (2 * camera.y * ratio) / height);
    this.layers.forEach((layer, i) => {
      const from = Math.min(Math.floor(prefix) - 1, layer.layouts.length - 1);
      const to = Math.min(from + 1, layer.layouts.length - 1);
      gl.bindVertexArray(layer.array);
      [layer.from, layer.to].forEach((buffer, side) => {
        const wanted = side ? to : from;
        if (layer.loaded[side] === wanted) return;
        gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
        gl.bufferData(gl.ARRAY_BUFFER, layer.layouts[wanted], gl.STATIC_DRAW);
        layer.loaded[side] = wanted;
      });
      gl.uniform1f(this.place("mixed"), prefix - Math.floor(prefix));
      gl.uniform1f(this.place("size"), sizes[i] * ratio);
      gl.uniform1f(this.place("ring"), i ? 1 : 0);
      gl.drawArrays(gl.POINTS, 0, layer.n);
    });
  }
}
