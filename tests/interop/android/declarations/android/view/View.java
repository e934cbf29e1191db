package android.view;

public class View {
    public interface OnClickListener { void onClick(View view); }
    public final android.content.Context getContext() { return null; }
    public void setEnabled(boolean enabled) {}
    public boolean isEnabled() { return true; }
    public void setFitsSystemWindows(boolean fits) {}
    public boolean getFitsSystemWindows() { return true; }
    public void setOnClickListener(OnClickListener listener) {}
}
