import java.lang.invoke.MethodHandles;
import java.lang.invoke.VarHandle;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Arrays;
import java.util.HashMap;

/**
 * Counts in a pair of words behind two marks, while threads check tables of arrays that they keep replacing.
 * usage: java Busy.java MARK MARK. It prints "at N" now and then, or once "FAIL ...".
 */
public class Busy {
    static final VarHandle WORDS = MethodHandles.byteBufferViewVarHandle(long[].class, ByteOrder.LITTLE_ENDIAN);

    static int[] entry(int key, int turn) {
        int[] made = new int[64];
        Arrays.setAll(made, i -> key * 31 + turn * 7 + i);
        made[0] = turn;
        return made;
    }

    static void replaceEntries(int seed) {
        HashMap<Integer, int[]> table = new HashMap<>();
        for (int turn = seed;; turn++) {
            int key = Math.floorMod(turn * 40503, 5003);
            int[] found = table.get(key);
            if (found != null && !Arrays.equals(found, entry(key, found[0]))) {
                System.out.println("FAIL entry " + key + ": " + Arrays.toString(found));
                System.exit(1);
            }
            table.put(key, entry(key, turn));
        }
    }

    public static void main(String[] arguments) throws Exception {
        ByteBuffer memory = ByteBuffer.allocateDirect(4096);
        for (int i = 0; i < 2; i++)
            WORDS.setVolatile(memory, 8 * i, Long.parseUnsignedLong(arguments[i]));
        for (int i = 0; i < 2; i++) {
            int seed = i;
            Thread thread = new Thread(() -> replaceEntries(seed), "replacer-" + i);
            thread.setDaemon(true);
            thread.start();
        }
        for (long count = 1;; count++) {
            WORDS.setVolatile(memory, 16, count);
            WORDS.setVolatile(memory, 24, count);
            if (count % 1000000 == 0)
                System.out.println("at " + count);
        }
    }
}
