package android.content;

public abstract class Context {
    public java.io.File getExternalFilesDir(String type) { return null; }
    public java.io.File getCacheDir() { return null; }
}
