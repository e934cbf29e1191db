package moec.example

/** An open model. Each flavor of the app has its own, which `openWriter` opens. */
interface Writer : AutoCloseable {
    /** Answers [prompt]; [onText] gets each piece of the answer when it is known. Returns when the answer is complete. */
    fun write(prompt: String, onText: (String) -> Unit)
}
