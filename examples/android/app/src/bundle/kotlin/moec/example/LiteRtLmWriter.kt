package moec.example

import android.content.Context
import com.google.ai.edge.litertlm.Engine
import com.google.ai.edge.litertlm.EngineConfig
import java.io.File
import kotlinx.coroutines.runBlocking

/** The file that `moec export --target tflite --bundle` writes, in the app's folder. */
const val BUNDLE = "model.litertlm"

fun openWriter(context: Context): Writer {
    val bundle = File(context.getExternalFilesDir(null), BUNDLE)
    check(bundle.exists()) { "adb push $BUNDLE ${bundle.parent}/" }
    return LiteRtLmWriter(bundle, context.cacheDir)
}

/**
 * A bundle in LiteRT-LM, which does everything itself: chat template, tokenizer, prefill in pieces, states, sampling.
 *
 * The conversation goes on from message to message.
 */
class LiteRtLmWriter(bundle: File, cache: File) : Writer {
    private val engine = Engine(EngineConfig(modelPath = bundle.path, cacheDir = cache.path)).apply { initialize() }
    private val conversation = engine.createConversation()

    override fun write(prompt: String, onText: (String) -> Unit) = runBlocking {
        conversation.sendMessageAsync(prompt).collect { onText(it.toString()) }
    }

    override fun close() {
        conversation.close()
        engine.close()
    }
}
