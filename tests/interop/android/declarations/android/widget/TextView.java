package android.widget;

public class TextView extends android.view.View {
    public TextView(android.content.Context context) {}
    public CharSequence getText() { return null; }
    public final void setText(CharSequence text) {}
    public CharSequence getHint() { return null; }
    public final void setHint(CharSequence hint) {}
    public void setTextIsSelectable(boolean selectable) {}
    public final void append(CharSequence text) {}
}
