#!/usr/bin/env python3
"""Libraries to link a CUDA program with that need no CUDA: lazystub.py CUDARC_SOURCES FOLDER [--cuda-major 13]

Writes FOLDER/lib<name>.so for each library that cudarc links: a linker script that pulls in a static archive of trampolines. The
program then names no CUDA library among its needs. Each is opened at the first call; where it, or the function, is missing, the
call returns an error code, so that the program can say so or go on without a GPU. CUDA_LAZY_DEBUG=1 prints what the loader said,
CUDA_LAZY_DIR names a folder that is looked in first. The functions' names come from cudarc's own declarations. x86-64 only.
"""
import os
import re
import subprocess
import sys

src, out = sys.argv[1], os.path.abspath(sys.argv[2])
major = sys.argv[4] if len(sys.argv) > 4 else '13'
LIBS = {  # link name: (cudarc modules, soname, error to return)
    'cuda': (['driver'], ['libcuda.so.1'], 100),           # CUDA_ERROR_NO_DEVICE
    'cublas': (['cublas'], ['libcublas.so.' + major], 1),   # NOT_INITIALIZED
    'cublasLt': (['cublaslt'], ['libcublasLt.so.' + major], 1),
    'curand': (['curand'], ['libcurand.so.10'], 203),
    'nvrtc': (['nvrtc'], ['libnvrtc.so.' + major], 7),
    'cudnn': (['cudnn'], ['libcudnn.so.9'], 1001),
    'nccl': (['nccl'], ['libnccl.so.2'], 3),
}
os.makedirs(out, exist_ok=True)
for name, (mods, sonames, err) in LIBS.items():
    syms = set()
    for m in mods:
        p = os.path.join(src, m, 'sys', 'mod.rs')
        t = open(p).read()
        syms |= set(re.findall(r'extern "C" \{\s*fn (\w+)\s*\(', t))
    syms = sorted(syms)
    assert syms, name
    tag = 'lazy_' + name
    asm = ['.text']
    for i, s in enumerate(syms):
        asm += [f'.globl {s}', f'.type {s},@function', f'{s}:', f'  jmpq *{tag}_slots+{8*i}(%rip)',
                f'.size {s},.-{s}', f'{tag}_r{i}:', f'  pushq ${i}', f'  jmp {tag}_common']
    asm += [f'{tag}_common:'] + [f'  pushq %{r}' for r in 'rax rdi rsi rdx rcx r8 r9'.split()]
    asm += ['  subq $136,%rsp'] + [f'  movups %xmm{i},{16*i}(%rsp)' for i in range(8)]
    asm += ['  movq 192(%rsp),%rdi', f'  callq {tag}_resolve', '  movq %rax,%r11']
    asm += [f'  movups {16*i}(%rsp),%xmm{i}' for i in range(8)] + ['  addq $136,%rsp']
    asm += [f'  popq %{r}' for r in 'r9 r8 rcx rdx rsi rdi rax'.split()] + ['  addq $8,%rsp', '  jmpq *%r11']
    asm += ['.section .data.rel,"aw",@progbits', '.balign 8', f'{tag}_slots:', f'.globl {tag}_slots', f'.hidden {tag}_slots']
    asm += [f'  .quad {tag}_r{i}' for i in range(len(syms))]
    asm += ['.section .note.GNU-stack,"",@progbits']
    c = f'''#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
extern void *{tag}_slots[] __attribute__((visibility("hidden")));
static const char *const names[] = {{{','.join('"%s"' % s for s in syms)}}};
static const char *const sonames[] = {{{','.join('"%s"' % s for s in sonames)}}};
static long missing(void) {{ return {err}; }}
static void *lib(void) {{
  static void *h; static int tried;
  if (__atomic_load_n(&tried, __ATOMIC_ACQUIRE)) return h;
  void *x = 0;
  const char *dir = getenv("CUDA_LAZY_DIR");
  for (unsigned i = 0; !x && i < sizeof sonames / sizeof *sonames; i++) {{
    if (dir) {{ char b[4096]; snprintf(b, sizeof b, "%s/%s", dir, sonames[i]); x = dlopen(b, RTLD_NOW | RTLD_GLOBAL); }}
    if (!x) x = dlopen(sonames[i], RTLD_NOW | RTLD_GLOBAL);
  }}
  if (!x && getenv("CUDA_LAZY_DEBUG")) fprintf(stderr, "lazy {name}: %s\\n", dlerror());
  h = x; __atomic_store_n(&tried, 1, __ATOMIC_RELEASE);
  return x;
}}
__attribute__((visibility("hidden"))) void *{tag}_resolve(unsigned long i) {{
  void *h = lib(), *p = h ? dlsym(h, names[i]) : 0;
  if (!p) {{ if (h && getenv("CUDA_LAZY_DEBUG")) fprintf(stderr, "lazy {name}: no %s\\n", names[i]); p = (void *)missing; }}
  __atomic_store_n(&{tag}_slots[i], p, __ATOMIC_RELEASE);
  return p;
}}
'''
    a = os.path.join(out, tag)
    open(a + '.s', 'w').write('\n'.join(asm) + '\n'); open(a + '.c', 'w').write(c)
    subprocess.check_call(['gcc', '-c', '-fPIC', '-o', a + '_t.o', a + '.s'])
    subprocess.check_call(['gcc', '-c', '-O2', '-fPIC', '-o', a + '_c.o', a + '.c'])
    ar = os.path.join(out, f'lib{tag}.a')
    if os.path.exists(ar): os.remove(ar)
    subprocess.check_call(['ar', 'rcs', ar, a + '_t.o', a + '_c.o'])
    for x in ('.s', '.c', '_t.o', '_c.o'): os.remove(a + x)
    so = os.path.join(out, f'lib{name}.so')
    if os.path.lexists(so): os.remove(so)
    open(so, 'w').write(f'INPUT({ar})\n')
    print(name, len(syms), 'symbols')
