package moec.decoding

import java.io.File
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.float
import kotlinx.serialization.json.int
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonObject
import kotlinx.serialization.json.jsonPrimitive

/** The signature for one token. The signatures for prompts are `prefill_N`, for N tokens. */
const val DECODE = "decode"
const val PREFILL = "prefill_"

const val TOKENS = "tokens"
const val POSITIONS = "input_pos"
/** Only in prefill signatures of models with convolutions or scans: the tokens that are not padding. */
const val TOKEN_COUNT = "token_count"
const val LOGITS = "logits"

/** An input of a signature. */
class Input(val name: String, val shape: List<Int>) {
    /** Number of its values. */
    val size: Int get() = shape.fold(1, Int::times)
}

/**
 * A TFLite artifact as moec describes it.
 *
 * @property inputs Signature -> its inputs.
 * @property states Names that each signature has both as an input and as an output, without the logits.
 * @property context Tokens that the states have room for, prompt and answer together.
 * @property defaults Values of inputs that a routing policy added, such as `routing_budget`.
 * @property borders Lengths at which rotary embeddings change; padding must not make a sequence reach one.
 * @property endTokens Tokens that end an answer.
 */
class Artifact(
    val inputs: Map<String, List<Input>>,
    val states: List<String>,
    val context: Int,
    val defaults: Map<String, FloatArray>,
    val borders: List<Int>,
    val endTokens: Set<Int>,
) {
    /** Token counts of the prefill signatures, the largest first. */
    val prefillLengths: List<Int> =
        inputs.keys.filter { it.startsWith(PREFILL) }.map { it.removePrefix(PREFILL).toInt() }.sortedDescending()

    companion object {
        /** Reads moec.json, generation_config.json and config.json in [folder]. */
        fun read(folder: File): Artifact {
            val manifest = parse(File(folder, "moec.json"))
            val signature = manifest.getValue("signature").jsonObject
            val facts = manifest.getValue("facts").jsonObject
            return Artifact(
                inputs = signature.getValue("signatures").jsonObject.mapValues { (_, it) -> inputsOf(it.jsonObject) },
                states = signature.getValue("states").jsonArray.map { it.jsonObject.string("name") },
                context = facts.getValue("context").jsonPrimitive.int,
                defaults = facts["inputs"]?.jsonObject.orEmpty().mapValues { (_, it) -> floats(it.jsonArray) },
                borders = facts["rotary_borders"]?.jsonArray.orEmpty().map { it.jsonPrimitive.int },
                endTokens = endTokens(folder),
            )
        }

        private fun inputsOf(signature: JsonObject): List<Input> =
            signature.getValue("inputs").jsonArray.map { it.jsonObject }.map { input ->
                Input(input.string("name"), input.getValue("shape").jsonArray.map { it.jsonPrimitive.int })
            }

        /** As in transformers: if generation_config.json names any token, only its tokens count. */
        private fun endTokens(folder: File): Set<Int> =
            listOf("generation_config.json", "config.json")
                .map { File(folder, it) }
                .filter { it.exists() }
                .map(::parse)
                .flatMap { listOf(it, it["text_config"] as? JsonObject) }
                .map { integers(it?.get("eos_token_id")) }
                .firstOrNull { it.isNotEmpty() }
                .orEmpty()

        private fun integers(found: JsonElement?): Set<Int> =
            when (found) {
                is JsonArray -> found.map { it.jsonPrimitive.int }.toSet()
                is JsonPrimitive -> setOfNotNull(found.content.toIntOrNull())
                else -> emptySet()
            }

        private fun floats(values: JsonArray) = FloatArray(values.size) { values[it].jsonPrimitive.float }

        private fun JsonObject.string(name: String) = getValue(name).jsonPrimitive.content

        private fun parse(file: File): JsonObject = Json.parseToJsonElement(file.readText()).jsonObject
    }
}
