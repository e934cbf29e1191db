package moec.decoding

import java.util.Random
import kotlin.math.exp

interface Tokenizer {
    /** Tokens of a text, with those that the model expects before it. */
    fun encode(text: String): IntArray

    /** Text of tokens, without special ones. */
    fun decode(tokens: IntArray): String
}

/** Chooses the next token: the most likely one at [temperature] 0, else a draw among those that reach [topP]. */
class Sampler(private val temperature: Double = 0.0, private val topP: Double = 1.0, seed: Long = 0) {
    private val random = Random(seed)

    fun choose(logits: FloatArray): Int {
        if (temperature == 0.0) return logits.indices.maxBy { logits[it] }
        val order = logits.indices.sortedByDescending { logits[it] }
        val weights = order.map { exp((logits[it] - logits[order[0]]) / temperature) }
        val enough = topP * weights.sum()
        val sums = weights.runningReduce(Double::plus)
        val last = sums.indexOfFirst { it >= enough }.let { if (it < 0) sums.lastIndex else it }
        val drawn = random.nextDouble() * sums[last]
        return order[sums.indexOfFirst { it > drawn }]
    }
}

/** Longest character of UTF-8 in bytes, and so in tokens. */
private const val LONGEST_CHARACTER = 4

/**
 * Turns tokens into text one by one.
 *
 * A token is decoded together with those before it, since decoders drop a space at the start of a text, and waits
 * until its character is complete.
 */
class TextStream(private val tokenizer: Tokenizer, prompt: IntArray) {
    private val tokens = prompt.takeLast(2 * LONGEST_CHARACTER).toMutableList()
    private var start = 0
    private var done = tokens.size

    /** The text that [token] completes; empty where its character is not complete yet. */
    fun add(token: Int): String {
        tokens += token
        val text = rest()
        val complete = text.isNotEmpty() && !text.endsWith('\uFFFD')
        if (!complete && tokens.size - done < LONGEST_CHARACTER) return ""
        start = done
        done = tokens.size
        return text
    }

    /** What is left at the end. */
    fun end(): String = if (done < tokens.size) rest() else ""

    private fun rest(): String {
        val before = tokenizer.decode(tokens.subList(start, done).toIntArray())
        val all = tokenizer.decode(tokens.subList(start, tokens.size).toIntArray())
        return all.removePrefix(all.commonPrefixWith(before))
    }
}

/** Continues [prompt] by up to [maxTokens] tokens and gives each piece of text to [onText] as soon as it is known. */
fun <B> generate(
    artifact: Artifact,
    decoder: Decoder<B>,
    tokenizer: Tokenizer,
    prompt: String,
    maxTokens: Int,
    sampler: Sampler = Sampler(),
    onText: (String) -> Unit,
) {
    val tokens = tokenizer.encode(prompt)
    val text = TextStream(tokenizer, tokens)
    decoder.reset()
    var logits = decoder.feed(tokens)
    for (count in 1..maxTokens) {
        val token = sampler.choose(logits)
        if (token in artifact.endTokens) break
        text.add(token).takeIf { it.isNotEmpty() }?.let(onText)
        if (count == maxTokens || decoder.length == artifact.context) break
        logits = decoder.feed(intArrayOf(token))
    }
    text.end().takeIf { it.isNotEmpty() }?.let(onText)
}
