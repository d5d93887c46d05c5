/* All-reduces of MPI: f32 sums, out of place.
 *
 *     mpirun -n RANKS mpi RUNS BYTES...
 *
 * Rank 0 prints a line for each size: bytes, and seconds of one all-reduce as the slowest rank sees it (median over runs).
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

static const double RUN_SECONDS = 0.05;

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Seconds of one all-reduce among so many. */
static double timed(const float *input, float *output, int count, int repeats) {
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    for (int i = 0; i < repeats; i++) MPI_Allreduce(input, output, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    double own = (MPI_Wtime() - start) / repeats, slowest;
    MPI_Allreduce(&own, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    return slowest;
}

static void measure(size_t bytes, int runs) {
    int rank, ranks, count = (int)(bytes / sizeof(float));
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    float *input = malloc(bytes), *output = malloc(bytes);
    double *seconds = malloc(runs * sizeof *seconds);
    if (!input || !output || !seconds) MPI_Abort(MPI_COMM_WORLD, 1);
    for (int i = 0; i < count; i++) input[i] = (float)(rank + 1);
    timed(input, output, count, 1);
    for (int i = 0; i < count; i++)
        if (output[i] != ranks * (ranks + 1) / 2.0f) MPI_Abort(MPI_COMM_WORLD, 2);
    int repeats = (int)(RUN_SECONDS / timed(input, output, count, 1));
    repeats = repeats < 1 ? 1 : repeats > 5000 ? 5000 : repeats;
    for (int run = 0; run < runs; run++) seconds[run] = timed(input, output, count, repeats);
    qsort(seconds, runs, sizeof *seconds, ascending);
    if (rank == 0) printf("%zu %.9f\n", bytes, seconds[runs / 2]);
    fflush(stdout);
    free(input), free(output), free(seconds);
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    for (int i = 2; i < argc; i++) measure(strtoull(argv[i], NULL, 10), atoi(argv[1]));
    MPI_Finalize();
}
