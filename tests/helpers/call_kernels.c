/* Calls compiled functions by name, with arguments from a file: the same calls under another compiler or processor.
 *
 * usage: call_kernels CALLS RESULTS. All numbers are int64 of the processor's order. Of each call the file has the name
 * (64 bytes), how many arguments there are, and each one's kind and value: 0 an integer; 1 a float, by its bits; 2 a
 * buffer, by its size, how many places in it hold addresses, for each the place and the number of the earlier argument
 * whose address belongs there, and then its bytes. RESULTS has of each call what was returned, and all its buffers.
 * Buffers are as large as they say, so that a sanitizer sees what reaches beyond. tests/native/test_portability.py
 * writes CALLS.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARGUMENTS 20
#define FLOATS 2

/* Integers and floats have registers of their own, and arguments that a function does not have are ignored. */
typedef int64_t Function(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float);

static void stop(const char *why, const char *what) {
    fprintf(stderr, "%s: %s\n", why, what);
    exit(3);
}

static void read_all(void *to, int64_t bytes, FILE *from) {
    if (fread(to, 1, (size_t)bytes, from) != (size_t)bytes) stop("the file of calls ends too early", "");
}

static int64_t number(FILE *from) {
    int64_t found;
    read_all(&found, 8, from);
    return found;
}

static void *buffer(int64_t bytes, FILE *from, const int64_t *earlier) {
    const int64_t places = number(from);
    int64_t place[64], which[64];
    void *found;
    if (places > 64 || posix_memalign(&found, 64, (size_t)(bytes ? bytes : 1))) stop("no memory for a buffer", "");
    for (int64_t i = 0; i < places; i++) {
        place[i] = number(from);
        which[i] = number(from);
    }
    read_all(found, bytes, from);
    for (int64_t i = 0; i < places; i++) memcpy((char *)found + place[i], earlier + which[i], 8);
    return found;
}

int main(int count, char **names) {
    FILE *calls = count == 3 ? fopen(names[1], "rb") : NULL, *results = count == 3 ? fopen(names[2], "wb") : NULL;
    char name[64];
    if (calls == NULL || results == NULL) stop("usage: call_kernels CALLS RESULTS", "");
    while (fread(name, 1, sizeof name, calls) == sizeof name) {
        int64_t all[ARGUMENTS + FLOATS + 32], sizes[ARGUMENTS + FLOATS + 32], a[ARGUMENTS] = {0};
        float floats[FLOATS] = {0};
        const int64_t given = number(calls);
        int64_t integers = 0, fractions = 0;
        void *address = dlsym(RTLD_DEFAULT, name);
        Function *function;
        if (address == NULL || given > ARGUMENTS + FLOATS + 32) stop("no such function", name);
        memcpy(&function, &address, sizeof function);
        for (int64_t i = 0; i < given; i++) {
            const int64_t kind = number(calls), value = number(calls);
            sizes[i] = kind < 2 ? -1 : value;
            all[i] = kind < 2 ? value : (int64_t)(intptr_t)buffer(value, calls, all);
            if (kind == 1)
                memcpy(&floats[fractions++], &value, 4);
            else if (kind < 3) /* 3 is a buffer that only others point at */
                a[integers++] = all[i];
        }
        const int64_t returned = function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                                          a[13], a[14], a[15], a[16], a[17], a[18], a[19], floats[0], floats[1]);
        fwrite(&returned, 8, 1, results);
        for (int64_t i = 0; i < given; i++)
            if (sizes[i] >= 0) {
                fwrite((void *)(intptr_t)all[i], 1, (size_t)sizes[i], results);
                free((void *)(intptr_t)all[i]);
            }
    }
    fclose(calls);
    return fclose(results) ? 3 : 0;
}
