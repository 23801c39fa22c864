// The one translation unit that compiles Boost.JSON, so that no shared library of it is needed.
#include <boost/json/src.hpp>
