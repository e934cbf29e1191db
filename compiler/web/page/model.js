// The model in ONNX Runtime web: its session, the states from step to step, and the experts of each token.

const ARRAYS = { float32: Float32Array, float16: Uint16Array, int64: BigInt64Array };
const PIECE = 256; // tokens of a prompt that are fed at once, which bounds the memory of their logits

export class Model {
  /** `files` maps paths to bytes; `options` are those of a session of ONNX Runtime web. */
  static async open(ort, site, files, options) {
    const externalData = site.model.data.map((path) => ({ path: path.split("/").at(-1), data: files.get(path) }));
    const session = await ort.InferenceSession.create(files.get(site.model.graph), {
      logSeverityLevel: 3,
      externalData,
      ...options,
    });
    return new Model(ort, site, session);
  }

  constructor(ort, site, session) {
    this.ort = ort;
    this.site = site;
    this.session = session;
    this.wanted = ["logits", ...site.states.map((state) => state.output.name)];
    for (const layer of site.routing) this.wanted.push(layer.indices, layer.weights);
    this.wanted = [...new Set(this.wanted)];
    this.reset();
  }

  /** Starts a new text. */
  reset() {
    for (const tensor of Object.values(this.states ?? {})) tensor.dispose?.();
    this.length = 0;
    this.states = {};
    for (const { input } of this.site.states) {
      const dims = input.shape.map((size, axis) => (typeof size === "number" ? size : axis === 0 ? 1 : 0));
      const data = new ARRAYS[input.dtype](dims.reduce((product, size) => product * size, 1));
      this.states[input.name] = new this.ort.Tensor(input.dtype, data, dims);
    }
  }

  /** Feeds token ids; `scalars` are values of scalar inputs. Returns logits [V] of the last token and its experts. */
  async feed(ids, scalars) {
    let result;
    for (let start = 0; start < ids.length; start += PIECE) {
      result = await this.step(ids.slice(start, start + PIECE), scalars);
    }
    return result;
  }

  async step(ids, scalars) {
    const total = this.length + ids.length;
    const integers = (values) => BigInt64Array.from(values, BigInt);
    const all = {
      input_ids: [integers(ids), ids.length],
      attention_mask: [new BigInt64Array(total).fill(1n), total],
      position_ids: [integers(ids.map((_, index) => this.length + index)), ids.length],
    };
    const feeds = { ...this.states };
    for (const [name, [data, size]] of Object.entries(all)) {
      if (this.session.inputNames.includes(name)) feeds[name] = new this.ort.Tensor("int64", data, [1, size]);
    }
    for (const [name, value] of Object.entries(scalars)) {
      feeds[name] = new this.ort.Tensor("float32", Float32Array.of(value), []);
    }
    const results = await this.session.run(feeds, this.wanted);
    this.length = total;
    for (const { input, output } of this.site.states) {
      if (this.states[input.name].location !== "cpu") this.states[input.name].dispose();
      this.states[input.name] = results[output.name];
    }
    const logits = results.logits.data;
    const size = results.logits.dims[2];
    return { logits: logits.subarray(logits.length - size), experts: this.experts(results) };
  }

  /** For each layer, the experts of the last token and their routing weights; a weight of 0 is a dropped expert. */
  experts(results) {
    return this.site.routing.map((layer) => {
      const width = results[layer.indices].dims.at(-1);
      const last = (tensor) => Array.from(tensor.data.subarray(tensor.data.length - width), Number);
      const weights = results[layer.weights];
      const values = weights.type === "float16" ? last(weights).map(fromHalf) : last(weights);
      return { experts: last(results[layer.indices]), weights: values };
    });
  }
}

function fromHalf(bits) {
  if (typeof Float16Array !== "undefined" && !Number.isInteger(bits)) return bits;
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}
