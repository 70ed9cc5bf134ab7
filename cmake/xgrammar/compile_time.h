// hadal's addition to xgrammar: compiling stops when nobody waits for it any more.
#ifndef XGRAMMAR_COMPILE_TIME_H_
#define XGRAMMAR_COMPILE_TIME_H_

namespace xgrammar {

/*! \brief Called often while a grammar is compiled; throws to end it. Defined by hadal
 * (src/engine_core/grammar/grammar_deadline.cpp). */
void CheckCompileTime();

}  // namespace xgrammar

#endif  // XGRAMMAR_COMPILE_TIME_H_
