package ai.djl.huggingface.tokenizers;

public final class HuggingFaceTokenizer implements AutoCloseable {
    public static HuggingFaceTokenizer newInstance(
            java.nio.file.Path modelPath, java.util.Map<String, String> options) throws java.io.IOException {
        return null;
    }
    public Encoding encode(String text) { return null; }
    public String decode(long[] ids, boolean skipSpecialTokens) { return null; }
    @Override public void close() {}
}
