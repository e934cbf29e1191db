package moec.decoding

import kotlin.math.min

/** A runtime in which the model is open. [B] is its kind of buffer for a tensor. */
interface Runtime<B> {
    fun inputBuffer(signature: String, name: String): B

    fun outputBuffer(signature: String, name: String): B

    fun write(buffer: B, values: IntArray)

    fun write(buffer: B, values: FloatArray)

    fun read(buffer: B): FloatArray

    fun run(signature: String, inputs: Map<String, B>, outputs: Map<String, B>)
}

/** The rest of a prompt is padded to a signature of at most this many times its length. */
private const val MAX_PADDING_FACTOR = 8

/**
 * Feeds tokens to a model and carries its states from call to call.
 *
 * The states exist twice: a call reads one set and writes the other, and then the sets change places. Nothing is copied.
 */
class Decoder<B>(private val artifact: Artifact, private val runtime: Runtime<B>) {
    private var past = artifact.states.associateWith { runtime.inputBuffer(DECODE, it) }
    private var next = artifact.states.associateWith { runtime.outputBuffer(DECODE, it) }
    private val calls = mutableMapOf<String, Call>()

    /** Tokens in the states. */
    var length = 0
        private set

    init {
        val known = setOf(TOKENS, POSITIONS, TOKEN_COUNT) + artifact.states + artifact.defaults.keys
        val unknown = artifact.inputs.values.flatten().map { it.name }.filter { it !in known }.distinct()
        require(unknown.isEmpty()) { "the model has inputs that this app does not feed: $unknown" }
        reset()
    }

    /** Starts a new text. */
    fun reset() {
        val sizes = artifact.inputs.getValue(DECODE).associate { it.name to it.size }
        for ((name, buffer) in past) runtime.write(buffer, FloatArray(sizes.getValue(name)))
        length = 0
    }

    /** Feeds [tokens], at least one, and returns the logits after the last. */
    fun feed(tokens: IntArray): FloatArray {
        require(tokens.isNotEmpty()) { "no tokens" }
        require(length + tokens.size <= artifact.context) {
            "${length + tokens.size} tokens are more than the context of ${artifact.context}"
        }
        var logits = FloatArray(0)
        var start = 0
        while (start < tokens.size) {
            val size = pieceLength(tokens.size - start)
            val end = min(start + size, tokens.size)
            logits = step(tokens.copyOfRange(start, end), size)
            start = end
        }
        return logits
    }

    /** Tokens of the signature for the next piece of a prompt of which [remaining] tokens are left. */
    private fun pieceLength(remaining: Int): Int {
        artifact.prefillLengths.firstOrNull { it <= remaining }?.let { return it }
        val end = length + remaining
        val fitting = artifact.prefillLengths.filter { size ->
            // Padding must fit into the states, and counts as tokens where rotary embeddings depend on the length.
            length + size <= artifact.context && artifact.borders.none { it in end until length + size }
        }
        val smallest = fitting.minOrNull() ?: return 1
        return if (remaining > 1 && remaining * MAX_PADDING_FACTOR >= smallest) smallest else 1
    }

    /** One call of the signature for [size] tokens. What [tokens] lack is padded at the end, and overwritten later. */
    private fun step(tokens: IntArray, size: Int): FloatArray {
        val signature = if (size == 1) DECODE else "$PREFILL$size"
        val call = calls.getOrPut(signature) { Call(signature) }
        // There is no mask: a token attends to the slots up to its own position, so padding is never looked at.
        runtime.write(call.inputs.getValue(TOKENS), tokens.copyOf(size))
        runtime.write(call.inputs.getValue(POSITIONS), IntArray(size) { length + it })
        call.inputs[TOKEN_COUNT]?.let { runtime.write(it, intArrayOf(tokens.size)) }
        runtime.run(signature, call.inputs + past, mapOf(LOGITS to call.logits) + next)
        past = next.also { next = past }
        length += tokens.size
        val logits = runtime.read(call.logits)
        val vocabulary = logits.size / size
        return logits.copyOfRange((tokens.size - 1) * vocabulary, tokens.size * vocabulary)
    }

    /** The buffers of a signature apart from the states. */
    private inner class Call(signature: String) {
        val inputs: Map<String, B> =
            artifact.inputs.getValue(signature).map { it.name }.filter { it !in artifact.states }
                .associateWith { runtime.inputBuffer(signature, it) }
        val logits: B = runtime.outputBuffer(signature, LOGITS)

        init {
            for ((name, values) in artifact.defaults) inputs[name]?.let { runtime.write(it, values) }
        }
    }
}
