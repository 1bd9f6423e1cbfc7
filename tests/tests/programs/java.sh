# A program that is ready only when the JVM has compiled and warmed it up; it then answers each line with one of its own. Its answers
# take threads, the collector of garbage, time and random numbers of the kernel's.
set -eu
cat >/tmp/Answers.java <<'JAVA'
import java.io.*;
import java.security.SecureRandom;
import java.util.*;
import java.util.concurrent.*;
import java.util.stream.*;

public class Answers {
    static long work(int seed) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(4);
        try {
            List<Future<Long>> parts = new ArrayList<>();
            for (int part = 0; part < 4; part++) {
                final int first = seed + part;
                parts.add(pool.submit(() -> IntStream.range(0, 20_000)
                        .mapToObj(number -> Integer.toString(first + number))
                        .collect(Collectors.groupingBy(String::length, TreeMap::new, Collectors.counting()))
                        .values().stream().mapToLong(Long::longValue).sum()));
            }
            long sum = 0;
            for (Future<Long> part : parts) sum += part.get();
            return sum;
        } finally {
            pool.shutdown();
        }
    }

    public static void main(String[] arguments) throws Exception {
        for (int round = 0; round < 5; round++) if (work(round) != 80_000) throw new IllegalStateException("warming up");
        System.gc();
        System.out.println("ready");
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = input.readLine()) != null; ) {
            byte[] drawn = new byte[8];
            SecureRandom.getInstance("NativePRNGNonBlocking").nextBytes(drawn);
            System.out.println(line.toUpperCase() + " " + work(line.length()) + " " + HexFormat.of().formatHex(drawn)
                    + " " + (System.currentTimeMillis() / 1000));
        }
    }
}
JAVA
exec java -Xmx256m -XX:+UseSerialGC /tmp/Answers.java
