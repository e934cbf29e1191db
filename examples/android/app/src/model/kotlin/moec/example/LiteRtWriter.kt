package moec.example

import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import android.content.Context
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import com.google.ai.edge.litert.TensorBuffer
import java.io.File
import moec.decoding.Artifact
import moec.decoding.Decoder
import moec.decoding.Runtime
import moec.decoding.Sampler
import moec.decoding.Tokenizer
import moec.decoding.generate

/** Files of the folder that `moec export --target tflite` writes. */
const val MODEL = "model.tflite"
const val TOKENIZER = "tokenizer.json"
private const val MAX_TOKENS = 256

fun openWriter(context: Context): Writer {
    val folder = checkNotNull(context.getExternalFilesDir(null))
    val missing = listOf(MODEL, TOKENIZER, "moec.json").filterNot { File(folder, it).exists() }
    check(missing.isEmpty()) { "adb push ${missing.joinToString(" ")} $folder/" }
    return LiteRtWriter(folder, context.cacheDir)
}

/** A model in LiteRT, which runs signatures; everything else is in the module `decoding`. Each prompt starts anew. */
class LiteRtWriter(folder: File, cache: File) : Writer {
    private val model = CompiledModel.create(File(folder, MODEL).path, options(cache))
    private val tokenizer = JsonTokenizer(File(folder, TOKENIZER))
    private val artifact = Artifact.read(folder)
    private val decoder = Decoder(artifact, LiteRt(model))

    override fun write(prompt: String, onText: (String) -> Unit) {
        val sampler = Sampler(temperature = 0.8, topP = 0.95, seed = System.nanoTime())
        generate(artifact, decoder, tokenizer, prompt, MAX_TOKENS, sampler, onText)
    }

    override fun close() {
        model.close()
        tokenizer.close()
    }
}

/** Weights in the layout of the kernels go to a file, once for all signatures, that later starts map into memory. */
private fun options(cache: File) =
    CompiledModel.Options(Accelerator.CPU).apply {
        cpuOptions = CompiledModel.CpuOptions(xnnPackWeightCachePath = File(cache, "$MODEL.xnnpack").path)
    }

private class LiteRt(private val model: CompiledModel) : Runtime<TensorBuffer> {
    override fun inputBuffer(signature: String, name: String) = model.createInputBuffer(name, signature)

    override fun outputBuffer(signature: String, name: String) = model.createOutputBuffer(name, signature)

    override fun write(buffer: TensorBuffer, values: IntArray) = buffer.writeInt(values)

    override fun write(buffer: TensorBuffer, values: FloatArray) = buffer.writeFloat(values)

    override fun read(buffer: TensorBuffer) = buffer.readFloat()

    override fun run(signature: String, inputs: Map<String, TensorBuffer>, outputs: Map<String, TensorBuffer>) =
        model.run(inputs, outputs, signature)
}

/** tokenizer.json in Hugging Face's own library. */
private class JsonTokenizer(file: File) : Tokenizer, AutoCloseable {
    private val tokenizer: HuggingFaceTokenizer

    init {
        // The library otherwise looks for a cloud machine and counts itself there.
        System.setProperty("OPT_OUT_TRACKING", "true")
        // By default it cuts texts to 512 tokens.
        tokenizer = HuggingFaceTokenizer.newInstance(file.toPath(), mapOf("truncation" to "false", "padding" to "false"))
    }

    override fun encode(text: String): IntArray =
        tokenizer.encode(text).ids.let { ids -> IntArray(ids.size) { ids[it].toInt() } }

    override fun decode(tokens: IntArray): String =
        tokenizer.decode(LongArray(tokens.size) { tokens[it].toLong() }, true)

    override fun close() = tokenizer.close()
}
