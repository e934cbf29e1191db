// Text to tokens and back, by the packages tokenizers.js and jinja.

import { Template } from "./vendor/@huggingface/jinja/index.js";
import { Tokenizer } from "./vendor/@huggingface/tokenizers/tokenizers.min.mjs";

import { Failure } from "./failure.js";

const decoder = new TextDecoder();
const FOLDER = "model/";
const INCOMPLETE = "\uFFFD";

export class Text {
  /** `files` holds the bytes of tokenizer.json and tokenizer_config.json. */
  constructor(files, site) {
    const json = (name) => JSON.parse(files.has(FOLDER + name) ? decoder.decode(files.get(FOLDER + name)) : "{}");
    this.tokenizer = new Tokenizer(json("tokenizer.json"), json("tokenizer_config.json"));
    this.site = site;
  }

  /** Token ids of a prompt; with `chat`, of a message in the model's chat template. */
  encode(prompt, chat) {
    const ids = chat
      ? this.tokenizer.encode(this.render(prompt), { add_special_tokens: false }).ids
      : this.tokenizer.encode(prompt).ids;
    const found = ids.length ? ids : this.site.start_tokens.slice(0, 1);
    if (!found.length) throw new Failure("prompt", "The prompt is empty.", "Write a few words.");
    return found;
  }

  render(prompt) {
    return new Template(this.site.chat.template).render({
      ...this.site.chat.special_tokens,
      messages: [{ role: "user", content: prompt }],
      tools: null,
      documents: null,
      add_generation_prompt: true,
    });
  }

  /** A function that takes one token after another and returns the text that each completes. */
  stream(prompt) {
    // The first token of an answer may begin with a space only where text stands before it.
    let ids = prompt.slice(-1);
    let shown = this.decode(ids);
    return (token) => {
      ids.push(token);
      const text = this.decode(ids);
      if (text.endsWith(INCOMPLETE) || text.length < shown.length) return "";
      const added = text.slice(shown.length);
      // At the end of a line the earlier tokens are let go, so that a long answer is not decoded again and again.
      if (added.endsWith("\n")) ids = [token];
      shown = added.endsWith("\n") ? this.decode(ids) : text;
      return added;
    };
  }

  decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
}
