package moec.example

import android.app.Activity
import android.os.Bundle
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import java.util.concurrent.Executors

/** A prompt, a button, and the answer as it is written. */
class MainActivity : Activity() {
    // One thread opens the model, writes and closes: a model runs one call at a time.
    private val worker = Executors.newSingleThreadExecutor()
    private var writer: Writer? = null
    private lateinit var prompt: EditText
    private lateinit var button: Button
    private lateinit var answer: TextView

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        prompt = EditText(this).apply { hint = "Prompt" }
        button = Button(this).apply { text = "Write" }
        answer = TextView(this).apply { setTextIsSelectable(true) }
        button.setOnClickListener { write(prompt.text.toString()) }
        setContentView(
            LinearLayout(this).apply {
                orientation = LinearLayout.VERTICAL
                fitsSystemWindows = true
                addView(prompt)
                addView(button)
                addView(ScrollView(context).apply { addView(answer) })
            }
        )
    }

    private fun write(text: String) {
        button.isEnabled = false
        answer.text = "Opening the model ..."
        worker.execute {
            try {
                val open = writer ?: openWriter(this).also { writer = it }
                show { answer.text = "" }
                open.write(text) { piece -> show { answer.append(piece) } }
            } catch (error: Exception) {
                show { answer.append("\n${error.message ?: error}") }
            } finally {
                show { button.isEnabled = true }
            }
        }
    }

    private fun show(change: () -> Unit) = runOnUiThread(change)

    override fun onDestroy() {
        worker.execute { writer?.close() }
        worker.shutdown()
        super.onDestroy()
    }
}
