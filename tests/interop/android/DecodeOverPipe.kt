/** Runs the module `decoding` of examples/android on a model and a tokenizer that the parent process has open. */
package moec.test

import java.io.DataInputStream
import java.io.DataOutputStream
import java.io.File
import moec.decoding.Artifact
import moec.decoding.Decoder
import moec.decoding.Runtime
import moec.decoding.Sampler
import moec.decoding.TextStream
import moec.decoding.Tokenizer
import moec.decoding.generate

/** Requests to the parent process on standard output, and its answers on standard input. Buffers are numbers there. */
class Pipe(private val input: DataInputStream, private val output: DataOutputStream) : Runtime<Int>, Tokenizer {
    override fun inputBuffer(signature: String, name: String) = created("input", signature, name)

    override fun outputBuffer(signature: String, name: String) = created("output", signature, name)

    private fun created(kind: String, signature: String, name: String): Int {
        send(kind)
        send(signature)
        tell(name)
        return input.readInt()
    }

    override fun write(buffer: Int, values: IntArray) {
        send("integers")
        output.writeInt(buffer)
        send(values)
    }

    override fun write(buffer: Int, values: FloatArray) {
        send("floats")
        output.writeInt(buffer)
        output.writeInt(values.size)
        for (value in values) output.writeFloat(value)
    }

    override fun read(buffer: Int): FloatArray {
        send("read")
        output.writeInt(buffer)
        output.flush()
        return FloatArray(input.readInt()) { input.readFloat() }
    }

    override fun run(signature: String, inputs: Map<String, Int>, outputs: Map<String, Int>) {
        send("run")
        send(signature)
        for (buffers in listOf(inputs, outputs)) {
            output.writeInt(buffers.size)
            for ((name, buffer) in buffers) {
                send(name)
                output.writeInt(buffer)
            }
        }
    }

    override fun encode(text: String): IntArray {
        send("encode")
        tell(text)
        return IntArray(input.readInt()) { input.readInt() }
    }

    override fun decode(tokens: IntArray): String {
        send("decode")
        send(tokens)
        output.flush()
        return ByteArray(input.readInt()).also(input::readFully).decodeToString()
    }

    /** Tells the parent a text, which is not a request. */
    fun tell(kind: String, text: String) {
        send(kind)
        tell(text)
    }

    private fun tell(text: String) {
        send(text)
        output.flush()
    }

    private fun send(text: String) {
        val bytes = text.encodeToByteArray()
        output.writeInt(bytes.size)
        output.write(bytes)
    }

    private fun send(values: IntArray) {
        output.writeInt(values.size)
        for (value in values) output.writeInt(value)
    }
}

/** `generate FOLDER TOKENS PROMPT...`, `stream TEXT` or `sample TEMPERATURE TOP_P DRAWS LOGIT...` */
fun main(arguments: Array<String>) {
    val pipe = Pipe(DataInputStream(System.`in`.buffered()), DataOutputStream(System.out.buffered()))
    when (arguments[0]) {
        "generate" -> {
            val artifact = Artifact.read(File(arguments[1]))
            val decoder = Decoder(artifact, pipe)
            for (prompt in arguments.drop(3)) {
                generate(artifact, decoder, pipe, prompt, arguments[2].toInt()) { pipe.tell("text", it) }
                pipe.tell("end", "")
            }
        }
        "stream" -> {
            val tokens = pipe.encode(arguments[1])
            val stream = TextStream(pipe, IntArray(0))
            for (token in tokens) pipe.tell("text", stream.add(token))
            pipe.tell("text", stream.end())
        }
        "sample" -> {
            val sampler = Sampler(arguments[1].toDouble(), arguments[2].toDouble())
            val logits = FloatArray(arguments.size - 4) { arguments[it + 4].toFloat() }
            repeat(arguments[3].toInt()) { pipe.tell("text", sampler.choose(logits).toString()) }
        }
    }
}
