#!/bin/bash
# gcc and make: a program of several files, a static and a shared library, threads, link-time optimisation, a sanitizer.
set -eu
gcc --version | head -n 1
mkdir /tmp/sum && cd /tmp/sum
cat >sum.h <<'C'
double sum(const double *values, long count);
C
cat >sum.c <<'C'
#include "sum.h"
double sum(const double *values, long count) {
    double total = 0;
    for (long i = 0; i < count; i++) total += values[i];
    return total;
}
C
cat >main.c <<'C'
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include "sum.h"
enum { THREADS = 8, COUNT = 100000 };
static atomic_long done;
static _Thread_local double values[COUNT];
static void *work(void *result) {
    for (long i = 0; i < COUNT; i++) values[i] = sqrt((double)i * i);
    *(double *)result = sum(values, COUNT);
    atomic_fetch_add(&done, 1);
    return NULL;
}
int main(void) {
    pthread_t threads[THREADS];
    double results[THREADS];
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, &results[i])) return 1;
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    printf("%ld %.0f\n", atomic_load(&done), sum(results, THREADS));
    return 0;
}
C
cat >Makefile <<'M'
CFLAGS = -O2 -Wall -Wextra -Werror -pthread
all: static shared lto
%.o: %.c sum.h
	gcc $(CFLAGS) -fPIC -c -o $@ $<
libsum.a: sum.o
	ar rcs $@ $^
libsum.so: sum.o
	gcc -shared -o $@ $^
static: main.o libsum.a
	gcc $(CFLAGS) -static -o $@ $^ -lm
shared: main.o libsum.so
	gcc $(CFLAGS) -o $@ main.o -L. -lsum -lm -Wl,-rpath,'$$ORIGIN'
lto: main.c sum.c
	gcc $(CFLAGS) -flto=auto -o $@ $^ -lm
M
make -s -j2
for program in static shared lto; do
    [ "$(./$program)" = '8 39999600000' ]
done
gcc -g -O1 -fsanitize=undefined,address -o checked main.c sum.c -lm -pthread
[ "$(./checked)" = '8 39999600000' ]
printf 'int main(void) { int *p = 0; return *p; }' | gcc -x c -o crash -
status=0
./crash 2>/dev/null || status=$?
[ $status = 139 ]
echo "gcc: all well"
