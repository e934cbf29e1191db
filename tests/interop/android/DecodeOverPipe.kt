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

/** A tensor in this process. */
class Values(var integers: IntArray? = null, var floats: FloatArray = FloatArray(0))

/** Requests to the parent process on standard output, and its answers on standard input. */
class Pipe(private val input: DataInputStream, private val output: DataOutputStream) : Runtime<Values>, Tokenizer {
    override fun inputBuffer(signature: String, name: String) = Values()

    override fun outputBuffer(signature: String, name: String) = Values()

    override fun write(buffer: Values, values: IntArray) {
        buffer.integers = values
    }

    override fun write(buffer: Values, values: FloatArray) {
        buffer.floats = values
    }

    override fun read(buffer: Values) = buffer.floats

    override fun run(signature: String, inputs: Map<String, Values>, outputs: Map<String, Values>) {
        send("run")
        send(signature)
        output.writeInt(inputs.size)
        for ((name, values) in inputs) {
            send(name)
            val integers = values.integers
            output.writeBoolean(integers != null)
            if (integers != null) send(integers) else send(values.floats)
        }
        output.writeInt(outputs.size)
        for (name in outputs.keys) send(name)
        output.flush()
        for (values in outputs.values) values.floats = FloatArray(input.readInt()) { input.readFloat() }
    }

    override fun encode(text: String): IntArray {
        tell("encode", text)
        return IntArray(input.readInt()) { input.readInt() }
    }

    override fun decode(tokens: IntArray): String {
        send("decode")
        send(tokens)
        output.flush()
        return ByteArray(input.readInt()).also(input::readFully).decodeToString()
    }

    fun tell(kind: String, text: String) {
        send(kind)
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

    private fun send(values: FloatArray) {
        output.writeInt(values.size)
        for (value in values) output.writeFloat(value)
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
