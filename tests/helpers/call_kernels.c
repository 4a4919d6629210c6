/* Calls compiled functions by name, with arguments from a file: the same calls under another compiler or processor.
 *
 * usage: call_kernels CALLS RESULTS. All numbers are int64 of the processor's order. Of each call the file has how many
 * items there are, and each one's kind and value: 0 an integer; 1 a float, by its bits; 2 a buffer, by its size, how
 * many places in it hold addresses, for each the place and the number of the earlier item whose address belongs there,
 * and then its bytes. Then come the functions that are called one after the other with these items: how many, and of
 * each the name (64 bytes), how many arguments there are, and their items. RESULTS has of each call what the functions
 * returned, and all its buffers. Buffers are as large as they say, so that a sanitizer sees what reaches beyond. tests/native/test_portability.py
 * writes CALLS.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARGUMENTS 20
#define FLOATS 2
#define ITEMS 64

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

/* Read a function and its arguments, and call it. */
static int64_t call(const int64_t *all, const int64_t *kinds, FILE *from) {
    char name[64];
    int64_t a[ARGUMENTS] = {0}, integers = 0, fractions = 0;
    float floats[FLOATS] = {0};
    Function *function;
    read_all(name, sizeof name, from);
    void *address = dlsym(RTLD_DEFAULT, name);
    const int64_t given = number(from);
    if (address == NULL || given > ARGUMENTS + FLOATS) stop("no such function", name);
    memcpy(&function, &address, sizeof function);
    for (int64_t i = 0; i < given; i++) {
        const int64_t item = number(from);
        if (kinds[item] == 1)
            memcpy(&floats[fractions++], &all[item], 4);
        else
            a[integers++] = all[item];
    }
    return function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15],
                    a[16], a[17], a[18], a[19], floats[0], floats[1]);
}

int main(int count, char **names) {
    FILE *calls = count == 3 ? fopen(names[1], "rb") : NULL, *results = count == 3 ? fopen(names[2], "wb") : NULL;
    int64_t given;
    if (calls == NULL || results == NULL) stop("usage: call_kernels CALLS RESULTS", "");
    while (fread(&given, 8, 1, calls) == 1) {
        int64_t all[ITEMS], kinds[ITEMS], sizes[ITEMS];
        if (given > ITEMS) stop("too many items", "");
        for (int64_t i = 0; i < given; i++) {
            kinds[i] = number(calls);
            sizes[i] = number(calls); /* or the value */
            all[i] = kinds[i] < 2 ? sizes[i] : (int64_t)(intptr_t)buffer(sizes[i], calls, all);
        }
        for (int64_t functions = number(calls); functions > 0; functions--) {
            const int64_t returned = call(all, kinds, calls);
            fwrite(&returned, 8, 1, results);
        }
        for (int64_t i = 0; i < given; i++)
            if (kinds[i] == 2) {
                fwrite((void *)(intptr_t)all[i], 1, (size_t)sizes[i], results);
                free((void *)(intptr_t)all[i]);
            }
    }
    fclose(calls);
    return fclose(results) ? 3 : 0;
}
