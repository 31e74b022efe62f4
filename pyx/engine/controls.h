/* Negative controls. A build with SNAPENGINE_CONTROLS can make a capture inconsistent on purpose; tests use
 * it to prove that the oracle detects this. In every other build the conditions are constants, and the
 * compiler removes them. */
#ifndef SNAPENGINE_CONTROLS_H
#define SNAPENGINE_CONTROLS_H

#ifdef SNAPENGINE_CONTROLS
#define snap_control(on) (on)
#else
#define snap_control(on) ((void)(on), 0)
#endif

#endif
