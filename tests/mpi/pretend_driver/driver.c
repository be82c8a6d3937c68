/* A pretend libcuda.so.1 for a machine without a GPU: device memory that faults when the CPU touches it.
 *
 *     gcc -O2 -fPIC -shared -I CUDA/include driver.c -o libcuda.so.1
 *
 * It has what Open MPI 4.1 asks of the driver (opal/mca/common/cuda) and what makes a context. An allocation is
 * shared memory that is mapped twice: without any rights at the address that callers get, so that an MPI that takes it
 * for its own memory ends by a segmentation fault, as on a GPU; and for reading and writing at an address that
 * only cuMemcpy and, through pretend_host_address, the pretended kernels of a test use. A handle for another process
 * (CUDA IPC) names the process and the file of the memory.
 *
 * All is done at once, in one context, and streams and events mean nothing. It proves who touches which memory,
 * not times, nor that all of the real driver's rules are kept.
 *
 * PRETEND_DRIVER_REPORT=1: at the end each process says on standard error how many bytes were copied, and which way.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { BLOCKS = 4096 };

typedef struct {
    char *device;            /* the address that callers have; NULL: this entry is free */
    char *host;              /* the same memory, for those who may */
    size_t size;
    int file;
    int foreign;             /* opened from another process's handle */
    unsigned long long id;   /* never the same again in this process */
} Block;

typedef struct {             /* what is in a CUipcMemHandle */
    pid_t process;
    int file;
    size_t size;
} Handle;

static Block blocks[BLOCKS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread CUcontext current;
static int primary;          /* its address is the one context; its value, how often it was retained */
static struct { size_t to_device, to_host, on_device, from_others; } copied;

__attribute__((destructor)) static void report(void)
{
    if (getenv("PRETEND_DRIVER_REPORT"))
        fprintf(stderr, "pretend driver: %zu bytes to the device, %zu to the host, %zu on the device, "
                "%zu of them from or to another process\n",
                copied.to_device, copied.to_host, copied.on_device, copied.from_others);
}

/* The block that has this address of the device, or NULL. */
static Block *block_of(const void *address)
{
    const char *a = address;
    for (Block *b = blocks; b < blocks + BLOCKS; b++)
        if (b->device && a >= b->device && a < b->device + b->size)
            return b;
    return NULL;
}

static size_t whole_pages(size_t size) { return (size + 4095) & ~(size_t)4095; }

/* Enter a file into the table, mapped twice. */
static CUresult map(int file, size_t size, int foreign, CUdeviceptr *found)
{
    static unsigned long long count;
    size_t length = whole_pages(size);
    char *host = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    char *device = mmap(NULL, length, PROT_NONE, MAP_SHARED, file, 0);
    Block *b = blocks;
    if (host == MAP_FAILED || device == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    while (b < blocks + BLOCKS && b->device)
        b++;
    if (b < blocks + BLOCKS)
        *b = (Block){device, host, size, file, foreign, ((unsigned long long)getpid() << 24) + ++count};
    pthread_mutex_unlock(&lock);
    if (b == blocks + BLOCKS)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *found = (CUdeviceptr)device;
    return CUDA_SUCCESS;
}

static CUresult unmap(CUdeviceptr address, int foreign)
{
    Block *b = block_of((void *)address);
    if (!b || b->device != (char *)address || b->foreign != foreign)
        return CUDA_ERROR_INVALID_VALUE;
    munmap(b->device, whole_pages(b->size));
    munmap(b->host, whole_pages(b->size));
    close(b->file);
    b->device = NULL;
    return CUDA_SUCCESS;
}

/* Where the CPU may touch n bytes that begin at any address, which is moved there if it is the device's. */
static Block *reach(char **address, size_t n, CUresult *problem)
{
    Block *b = block_of(*address);
    if (b && *address + n > b->device + b->size)
        *problem = CUDA_ERROR_INVALID_VALUE;
    if (b)
        *address = b->host + (*address - b->device);
    return b;
}

static CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t n)
{
    CUresult problem = current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
    char *target = (char *)to, *source = (char *)from;
    Block *t = reach(&target, n, &problem), *s = reach(&source, n, &problem);
    if (problem != CUDA_SUCCESS)
        return problem;
    if (t && s)
        copied.on_device += n;
    else if (t)
        copied.to_device += n;
    else if (s)
        copied.to_host += n;
    if ((t && t->foreign) || (s && s->foreign))
        copied.from_others += n;
    memmove(target, source, n);
    return CUDA_SUCCESS;
}

/* -- for tests: not in any driver ---------------------------------------------------------------------------- */

/* The address at which a pretended kernel may read and write what the device has there, or NULL. */
void *pretend_host_address(CUdeviceptr address)
{
    Block *b = block_of((void *)address);
    return b ? b->host + ((char *)address - b->device) : NULL;
}

/* The other way round, or 0. */
CUdeviceptr pretend_device_address(const void *address)
{
    const char *a = address;
    for (Block *b = blocks; b < blocks + BLOCKS; b++)
        if (b->device && a >= b->host && a < b->host + b->size)
            return (CUdeviceptr)(b->device + (a - b->host));
    return 0;
}

/* -- device and context -------------------------------------------------------------------------------------- */

CUresult cuInit(unsigned flags) { (void)flags; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number)
{
    *device = 0;
    return number ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceCanAccessPeer(int *can, CUdevice a, CUdevice b) { *can = a != b; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    (void)device;
    primary++;
    *context = (CUcontext)&primary;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { current = context; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = current; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device)
{
    *device = 0;
    return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

/* -- memory -------------------------------------------------------------------------------------------------- */

CUresult cuMemAlloc(CUdeviceptr *address, size_t size)
{
    int file = memfd_create("pretend-device", MFD_CLOEXEC);
    if (!current)
        return CUDA_ERROR_INVALID_CONTEXT;
    if (file < 0 || ftruncate(file, (off_t)whole_pages(size)))
        return CUDA_ERROR_OUT_OF_MEMORY;
    return map(file, size, 0, address);
}
CUresult cuMemFree(CUdeviceptr address) { return unmap(address, 0); }
CUresult cuMemGetAddressRange(CUdeviceptr *start, size_t *size, CUdeviceptr address)
{
    Block *b = block_of((void *)address);
    if (!b)
        return CUDA_ERROR_NOT_FOUND;
    if (start)
        *start = (CUdeviceptr)b->device;
    if (size)
        *size = b->size;
    return CUDA_SUCCESS;
}
CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t n) { return copy(to, from, n); }
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream stream)
{
    (void)stream;
    return copy(to, from, n);
}
CUresult cuMemHostRegister(void *address, size_t size, unsigned flags)
{
    (void)address, (void)size, (void)flags;
    return CUDA_SUCCESS;
}
CUresult cuMemHostUnregister(void *address) { (void)address; return CUDA_SUCCESS; }

/* What a pointer is; as the driver, nothing is known of the host's memory. */
CUresult cuPointerGetAttribute(void *answer, CUpointer_attribute attribute, CUdeviceptr address)
{
    Block *b = block_of((void *)address);
    if (!b)
        return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)answer = CU_MEMORYTYPE_DEVICE; break;
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)answer = (CUcontext)&primary; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)answer = 0; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long *)answer = b->id; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)answer = address; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)answer = 0; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}
/* The same, of several attributes; of memory that it does not know it says 0 and succeeds. */
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **answers, CUdeviceptr address)
{
    int known = block_of((void *)address) != NULL;
    for (unsigned i = 0; i < count; i++) {
        CUresult result = CUDA_SUCCESS;
        if (known)
            result = cuPointerGetAttribute(answers[i], attributes[i], address);
        else
            memset(answers[i], 0, attributes[i] == CU_POINTER_ATTRIBUTE_CONTEXT ? sizeof(CUcontext) : sizeof(unsigned));
        if (result != CUDA_SUCCESS)
            return result;
    }
    return CUDA_SUCCESS;
}
CUresult cuPointerSetAttribute(const void *value, CUpointer_attribute attribute, CUdeviceptr address)
{
    (void)value, (void)attribute;
    return block_of((void *)address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* -- memory of other processes ------------------------------------------------------------------------------- */

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address)
{
    Block *b = block_of((void *)address);
    if (!b || b->foreign)
        return CUDA_ERROR_INVALID_VALUE;
    memset(handle, 0, sizeof *handle);
    memcpy(handle->reserved, &(Handle){getpid(), b->file, b->size}, sizeof(Handle));
    return CUDA_SUCCESS;
}
CUresult cuIpcOpenMemHandle(CUdeviceptr *address, CUipcMemHandle handle, unsigned flags)
{
    Handle h;
    char path[64];
    int file;
    (void)flags;
    memcpy(&h, handle.reserved, sizeof h);
    if (!current || h.process == getpid())  /* the driver refuses the process that made it, too */
        return CUDA_ERROR_INVALID_CONTEXT;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", h.process, h.file);
    file = open(path, O_RDWR | O_CLOEXEC);
    return file < 0 ? CUDA_ERROR_INVALID_VALUE : map(file, h.size, 1, address);
}
CUresult cuIpcCloseMemHandle(CUdeviceptr address) { return unmap(address, 1); }
CUresult cuIpcGetEventHandle(CUipcEventHandle *handle, CUevent event)
{
    (void)event;
    memset(handle, 0, sizeof *handle);
    return CUDA_SUCCESS;
}
CUresult cuIpcOpenEventHandle(CUevent *event, CUipcEventHandle handle)
{
    (void)handle;
    *event = malloc(1);
    return CUDA_SUCCESS;
}

/* -- streams and events: all is done already ----------------------------------------------------------------- */

CUresult cuStreamCreate(CUstream *stream, unsigned flags) { (void)flags; *stream = malloc(1); return CUDA_SUCCESS; }
CUresult cuStreamDestroy(CUstream stream) { free(stream); return CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream stream) { (void)stream; return CUDA_SUCCESS; }
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    (void)stream, (void)event, (void)flags;
    return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent *event, unsigned flags) { (void)flags; *event = malloc(1); return CUDA_SUCCESS; }
CUresult cuEventDestroy(CUevent event) { free(event); return CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent event, CUstream stream) { (void)event, (void)stream; return CUDA_SUCCESS; }
CUresult cuEventQuery(CUevent event) { (void)event; return CUDA_SUCCESS; }
CUresult cuEventSynchronize(CUevent event) { (void)event; return CUDA_SUCCESS; }
